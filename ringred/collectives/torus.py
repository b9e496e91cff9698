"""The torus of any number of dimensions, by composing rings: X×Y takes 2(X−1) + 2(Y−1) steps, not 2(XY−1).

Mikami et al., Massively distributed SGD: ImageNet/ResNet-50 training in a flash (arXiv 1811.05233): reduce-scatter
along the rows, all-reduce of the owned shard along the columns, all-gather along the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from ringred.collectives.registry import algorithm
from ringred.collectives.ring import all_gather_on, reduce_scatter_on
from ringred.schedule.ir import Chunk, Group, Steps
from ringred.topology.torus import coordinates, line

__all__ = ["shards"]


def shards(rank: int, grid: tuple[int, ...]) -> Iterator[tuple[list[int], list[Chunk]]]:
    """For each dimension, the line of ranks through `rank` and the chunks into which it divides the shard that the
    previous dimension left to `rank`. In the last dimension each chunk is a single unit; `rank` owns one of them."""
    place = coordinates(rank, grid)
    start, width = 0, 1
    for extent in grid:
        width *= extent
    for dimension, extent in enumerate(grid):
        width //= extent
        yield (
            line(rank, grid, dimension),
            [Chunk(start + part * width, start + (part + 1) * width) for part in range(extent)],
        )
        start += place[dimension] * width


def _grid(group: Group) -> tuple[int, ...]:
    assert group.grid is not None, "the registry gives every torus its grid"
    return group.grid


def _home(group: Group) -> tuple[int, ...]:
    grid = _grid(group)
    owners = [0] * group.size
    for rank in range(group.size):
        *_, (members, chunks) = shards(rank, grid)
        owners[chunks[members.index(rank)].start] = rank
    return tuple(owners)


@algorithm("reduce_scatter", "torus", home=_home, grid=True)
def reduce_scatter(rank: int, group: Group) -> Steps:
    """Ring reduce-scatters along X, then of the shard along Y, and so on."""
    for members, chunks in shards(rank, _grid(group)):
        yield from reduce_scatter_on(members, rank, chunks)


@algorithm("all_gather", "torus", home=_home, grid=True)
def all_gather(rank: int, group: Group) -> Steps:
    """Ring all-gathers along the last dimension, then the one before, and at last along X."""
    for members, chunks in reversed(list(shards(rank, _grid(group)))):
        yield from all_gather_on(members, rank, chunks)


@algorithm("all_reduce", "torus", grid=True)
def all_reduce(rank: int, group: Group) -> Steps:
    """Ring reduce-scatters from X to the last dimension, all-gathers back: Σ2(d−1) messages, 2(P−1)/P·N bytes."""
    yield from reduce_scatter(rank, group)
    yield from all_gather(rank, group)
