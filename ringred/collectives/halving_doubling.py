"""Recursive halving, then doubling: log2 P rounds with partners at doubling distance, bandwidth-optimal.

Rabenseifner, Optimization of collective reduction operations (2004). If P is not a power of two, the
first ranks form pairs: one rank of each pair sends its data to the other at the start and gets the result at the end.
"""

from __future__ import annotations

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Chunk, Group, Recv, Send, Steps

__all__: list[str] = []


def _power(group: Group) -> int:
    """The greatest power of two ≤ P."""
    return 1 << (group.size.bit_length() - 1)


@algorithm("all_reduce", "halving_doubling", units=_power)
def all_reduce(rank: int, group: Group) -> Steps:
    """Recursive halving and doubling: 2log2P·α + 2(P−1)/P·Nβ + (P−1)/P·Nγ for P = 2^k; other P pair ranks first."""
    active = _power(group)
    extra = group.size - active
    everything = Chunk(0, active)
    if rank < 2 * extra and rank % 2 == 0:
        yield (Send(rank + 1, everything),)
        yield (Recv(rank + 1, everything),)
        return
    if rank < 2 * extra:
        yield (Recv(rank - 1, everything, reduce=True),)
    index = rank // 2 if rank < 2 * extra else rank - extra

    def rank_of(virtual: int) -> int:
        return 2 * virtual + 1 if virtual < extra else virtual + extra

    start, distance = 0, active // 2
    rounds: list[tuple[int, Chunk, Chunk]] = []
    while distance:
        partner = rank_of(index ^ distance)
        low, high = Chunk(start, start + distance), Chunk(start + distance, start + 2 * distance)
        mine, theirs = (high, low) if index & distance else (low, high)
        rounds.append((partner, mine, theirs))
        start, distance = mine.start, distance // 2
    for partner, mine, theirs in rounds:
        yield Send(partner, theirs), Recv(partner, mine, reduce=True)
    for partner, mine, theirs in reversed(rounds):
        yield Send(partner, mine), Recv(partner, theirs)
    if rank < 2 * extra:
        yield (Send(rank - 1, everything),)
