"""The ring: each rank sends to its right and receives from its left, 1/P of the data in each step.

Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations (2009).
"""

from __future__ import annotations

from collections.abc import Sequence

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Chunk, Group, Recv, Send, Steps, unit
from ringred.topology.ring import neighbours

__all__ = ["all_gather_on", "reduce_scatter_on"]


def reduce_scatter_on(members: Sequence[int], rank: int, chunks: Sequence[Chunk]) -> Steps:
    """P − 1 steps after which `members[i]` holds `chunks[i]` reduced over all members."""
    size = len(members)
    position, left, right = neighbours(members, rank)
    for step in range(size - 1):
        outgoing = chunks[(position - step - 1) % size]
        incoming = chunks[(position - step - 2) % size]
        yield Send(right, outgoing), Recv(left, incoming, reduce=True)


def all_gather_on(members: Sequence[int], rank: int, chunks: Sequence[Chunk]) -> Steps:
    """P − 1 steps after which every member holds the `chunks[i]` that `members[i]` held before."""
    size = len(members)
    position, left, right = neighbours(members, rank)
    for step in range(size - 1):
        outgoing = chunks[(position - step) % size]
        incoming = chunks[(position - step - 1) % size]
        yield Send(right, outgoing), Recv(left, incoming)


def _whole_ring(group: Group) -> tuple[range, list[Chunk]]:
    return range(group.size), [unit(rank) for rank in range(group.size)]


@algorithm("reduce_scatter", "ring")
def reduce_scatter(rank: int, group: Group) -> Steps:
    """P − 1 steps around the ring, 1/P of the data each."""
    members, chunks = _whole_ring(group)
    yield from reduce_scatter_on(members, rank, chunks)


@algorithm("all_gather", "ring")
def all_gather(rank: int, group: Group) -> Steps:
    """P − 1 steps around the ring, 1/P of the data each."""
    members, chunks = _whole_ring(group)
    yield from all_gather_on(members, rank, chunks)


@algorithm("all_reduce", "ring")
def all_reduce(rank: int, group: Group) -> Steps:
    """Reduce-scatter, then all-gather around the ring: 2(P−1)α + 2(P−1)/P·Nβ + (P−1)/P·Nγ."""
    yield from reduce_scatter(rank, group)
    yield from all_gather(rank, group)
