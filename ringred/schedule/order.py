"""How the schedules of all ranks fit together in time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from ringred.schedule.ir import Recv, Send, Step

__all__ = ["in_step", "turns"]


def in_step(schedule: Callable[[int], Sequence[Step]], size: int) -> bool:
    """Whether every message is sent and received in steps with the same number: only then do its sender and its
    receiver process parts in the same order."""
    sent: dict[tuple[int, int], list[int]] = defaultdict(list)
    received: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(size):
        for index, step in enumerate(schedule(rank)):
            for op in step:
                if isinstance(op, Send):
                    sent[rank, op.peer].append(index)
                else:
                    received[op.peer, rank].append(index)
    return sent == received


def turns(schedule: Callable[[int], Sequence[Step]], size: int) -> frozenset[tuple[int, int, int]]:
    """Step, sender and receiver of the messages whose receiver still had others to receive from in the step before."""
    found = set()
    for rank in range(size):
        before: set[int] = set()
        for index, step in enumerate(schedule(rank)):
            now = {op.peer for op in step if isinstance(op, Recv)}
            if before:
                found |= {(index, peer, rank) for peer in now - before}
            before = now
    return frozenset(found)
