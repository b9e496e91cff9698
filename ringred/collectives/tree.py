"""The binomial tree: reduce to the root, and broadcast from it, in ⌈log2 P⌉ rounds of the whole data."""

from __future__ import annotations

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Group, Recv, Send, Steps, unit
from ringred.topology.tree import binomial

__all__: list[str] = []


def _one(group: Group) -> int:
    return 1


@algorithm("reduce", "tree", units=_one)
def reduce(rank: int, group: Group) -> Steps:
    """Up the binomial tree, the smallest subtree first."""
    place = binomial(rank, group.size, group.root)
    for child in place.children:
        yield (Recv(child, unit(0), reduce=True),)
    if place.parent is not None:
        yield (Send(place.parent, unit(0)),)


@algorithm("broadcast", "tree", units=_one)
def broadcast(rank: int, group: Group) -> Steps:
    """Down the binomial tree, the largest subtree first."""
    place = binomial(rank, group.size, group.root)
    if place.parent is not None:
        yield (Recv(place.parent, unit(0)),)
    for child in reversed(place.children):
        yield (Send(child, unit(0)),)


@algorithm("all_reduce", "tree", units=_one)
def all_reduce(rank: int, group: Group) -> Steps:
    """Up the binomial tree and down again: 2log2P·α + 2log2P·Nβ + log2P·Nγ."""
    yield from reduce(rank, group)
    yield from broadcast(rank, group)


@algorithm("barrier", "tree", units=_one)
def barrier(rank: int, group: Group) -> Steps:
    """An all-reduce of a tiny buffer: no rank can leave before all ranks have entered."""
    yield from all_reduce(rank, group)
