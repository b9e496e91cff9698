"""Coordinates in binomial and binary trees of ranks."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = ["Place", "binomial", "double_binary"]


class Place(NamedTuple):
    """A rank's place in a tree: its parent (None at the root) and its children in the order to serve them."""

    parent: int | None
    children: tuple[int, ...]


def binomial(rank: int, size: int, root: int = 0) -> Place:
    """The place of `rank` in the binomial tree at `root`; child k is the root of a subtree of at most 2^k ranks."""
    virtual = (rank - root) % size
    children = []
    bit = 1
    while bit < size and not virtual & bit:
        if virtual + bit < size:
            children.append((virtual + bit + root) % size)
        bit <<= 1
    parent = (virtual - bit + root) % size if virtual else None
    return Place(parent, tuple(children))


@lru_cache(maxsize=64)
def double_binary(size: int) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """Two binary trees over the same ranks, where a rank is an inner node of at most one of them (Sanders, Speck and
    Träff 2009): each tree carries half of the data, so that all ranks send and receive the same amount.

    The first is the in-order tree in which leaves are the even ranks. The second is its mirror image where
    `size` is even, else the first shifted by one: leaves of one tree become inner nodes of the other.
    """
    first = _in_order(size)
    if size % 2 == 0:
        renamed = [size - 1 - rank for rank in range(size)]
    else:
        renamed = [(rank + 1) % size for rank in range(size)]
    second: list[Place] = [Place(None, ())] * size
    for rank, place in enumerate(first):
        parent = None if place.parent is None else renamed[place.parent]
        second[renamed[rank]] = Place(parent, tuple(renamed[child] for child in place.children))
    return first, tuple(second)


def _in_order(size: int) -> tuple[Place, ...]:
    """The in-order binary tree of positions 1..size (rank = position − 1), inner nodes at even positions."""
    children: list[list[int]] = []
    parents: list[int | None] = [None] * size
    for position in range(1, size + 1):
        low = position & -position
        mine = [position - low // 2] if low > 1 else []
        step = low // 2
        while step and position + step > size:
            step //= 2
        if step:
            mine.append(position + step)
        children.append([child - 1 for child in mine])
        for child in mine:
            parents[child - 1] = position - 1
    return tuple(Place(parent, tuple(mine)) for parent, mine in zip(parents, children, strict=True))
