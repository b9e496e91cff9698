"""Every rank sends to every other rank at once: two rounds for any number of ranks, and sums in rank order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Chunk, Group, Recv, Send, Steps, unit

__all__ = ["all_gather_among", "reduce_scatter_among"]


def _others(members: Sequence[int], rank: int, direction: int) -> Iterator[tuple[int, int]]:
    """(position, rank) of the other members, in circular order starting after `rank`.

    All ranks send in forward order and receive in backward order: so no two ranks send to the same rank at a time, and
    the message that arrives first is waited for first.
    """
    size, position = len(members), members.index(rank)
    for distance in range(1, size):
        other = (position + direction * distance) % size
        yield other, members[other]


def reduce_scatter_among(members: Sequence[int], rank: int, chunks: Sequence[Chunk]) -> Steps:
    """One step after which `members[i]` holds `chunks[i]`, folded in rank order."""
    mine = chunks[members.index(rank)]
    sends = [Send(peer, chunks[position]) for position, peer in _others(members, rank, 1)]
    receives = [Recv(peer, mine, reduce=True) for _, peer in _others(members, rank, -1)]
    if sends:
        yield (*sends, *receives)


def all_gather_among(members: Sequence[int], rank: int, chunks: Sequence[Chunk]) -> Steps:
    """One step after which every member holds the `chunks[i]` that `members[i]` held before."""
    mine = chunks[members.index(rank)]
    sends = [Send(peer, mine) for _, peer in _others(members, rank, 1)]
    receives = [Recv(peer, chunks[position]) for position, peer in _others(members, rank, -1)]
    if sends:
        yield (*sends, *receives)


def _shares(group: Group) -> tuple[range, list[Chunk]]:
    return range(group.size), [unit(rank) for rank in range(group.size)]


@algorithm("reduce_scatter", "direct", rank_order=True)
def reduce_scatter(rank: int, group: Group) -> Steps:
    """Every rank gets its share from all others in one round and adds it in rank order."""
    members, chunks = _shares(group)
    yield from reduce_scatter_among(members, rank, chunks)


@algorithm("all_gather", "direct")
def all_gather(rank: int, group: Group) -> Steps:
    """Every rank sends its share to all others in one round."""
    members, chunks = _shares(group)
    yield from all_gather_among(members, rank, chunks)


@algorithm("all_reduce", "direct", rank_order=True)
def all_reduce(rank: int, group: Group) -> Steps:
    """Each rank reduces 1/P of the data in rank order and sends it to all: 2(P−1) messages, 2(P−1)/P·N bytes."""
    yield from reduce_scatter(rank, group)
    yield from all_gather(rank, group)
