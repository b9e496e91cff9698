"""Coordinates on rings, tori and trees, machine models, and what is read off the machine."""

from __future__ import annotations

import pytest

from ringred.errors import GridError
from ringred.topology.detect import host_indices, local_grid, machine
from ringred.topology.model import flat, grid_links, hosts
from ringred.topology.ring import neighbours
from ringred.topology.torus import check_grid, coordinates, line, near_square
from ringred.topology.tree import binomial, double_binary


def test_neighbours_on_a_ring_of_some_ranks() -> None:
    assert neighbours([4, 7, 9], 4) == (0, 9, 7)
    assert neighbours([4, 7, 9], 9) == (2, 7, 4)


def test_near_square_grids() -> None:
    grids = {size: near_square(size) for size in (1, 2, 6, 7, 12, 16, 24, 1024)}
    assert grids == {1: (1, 1), 2: (2, 1), 6: (3, 2), 7: (7, 1), 12: (4, 3), 16: (4, 4), 24: (6, 4), 1024: (32, 32)}


def test_lines_of_a_torus_go_through_each_rank() -> None:
    grid = (3, 2, 2)
    for rank in range(12):
        place = coordinates(rank, grid)
        for dimension, extent in enumerate(grid):
            ranks = line(rank, grid, dimension)
            assert len(ranks) == extent
            assert ranks[place[dimension]] == rank
            assert [coordinates(r, grid)[dimension] for r in ranks] == list(range(extent))
    assert line(4, (3, 2), 0) == [3, 4, 5]
    assert line(4, (3, 2), 1) == [1, 4]


@pytest.mark.parametrize(
    ("grid", "size", "message"),
    [((4, 3), 10, "grid 4x3 holds 12 ranks, expected 10"), ((0, 3), 0, "positive"), ((), 1, "positive")],
)
def test_a_grid_that_does_not_fit(grid: tuple[int, ...], size: int, message: str) -> None:
    with pytest.raises(GridError, match=message):
        check_grid(grid, size)


@pytest.mark.parametrize("size", range(1, 40))
def test_binomial_trees_reach_everybody_once(size: int) -> None:
    for root in {0, size // 2, size - 1}:
        places = [binomial(rank, size, root) for rank in range(size)]
        assert [rank for rank, place in enumerate(places) if place.parent is None] == [root]
        children = sorted(child for place in places for child in place.children)
        assert children == sorted(set(range(size)) - {root})
        assert max(len(place.children) for place in places) == (size - 1).bit_length()


@pytest.mark.parametrize("size", range(1, 70))
def test_nobody_is_inside_both_of_two_binary_trees(size: int) -> None:
    for tree in double_binary(size):
        assert sum(place.parent is None for place in tree) == 1
        assert all(len(place.children) <= 2 for place in tree)
        for rank in range(size):
            depth, at = 0, rank
            while (parent := tree[at].parent) is not None:
                assert at in tree[parent].children
                at, depth = parent, depth + 1
            assert depth <= size.bit_length()
    first, second = double_binary(size)
    assert not any(a.children and b.children for a, b in zip(first, second, strict=True))


def test_links_are_those_of_the_outermost_difference() -> None:
    near, far = (1e-6, 1e-9), (5e-6, 8e-9)
    assert flat(4, *near, 0.0).link(0, 3) == near
    assert [hosts([0, 0, 1], near, far, 0.0).link(0, peer) for peer in (1, 2)] == [near, far]
    torus = grid_links((2, 2), (near, far), 0.0)
    assert [torus.link(0, peer) for peer in (1, 2, 3)] == [near, far, far]


def test_hosts_are_numbered_as_they_appear() -> None:
    assert host_indices(["b", "a", "b"]) == (0, 1, 0)
    assert local_grid([0, 0, 0, 1, 1, 1]) == (3, 2)
    assert local_grid([0, 0, 1]) is None
    assert local_grid([0, 1, 0, 1]) is None
    assert local_grid([0, 0, 0]) is None
    assert local_grid([0, 1, 2]) is None


def test_this_machine() -> None:
    here = machine()
    assert 1 <= here.usable_cores <= here.cores
    assert here.memory_bytes > 1 << 28
    assert here.sockets >= 1
