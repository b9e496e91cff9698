"""A schedule as a story: every message with what it carries, the round it goes in, and its simulated time.

Rounds are what a reader counts who steps through a schedule by hand: all messages that a rank sends in one step go in
one round, those of its next step in a later one, and none before what the rank has to receive first has come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ringred.schedule.cost import Cost, Job, Link, Simulation
from ringred.schedule.ir import Chunk, Recv, Send, Spec, Step
from ringred.schedule.matching import finishing_order, matched_messages

__all__ = ["Story", "Transfer", "tell"]


class Transfer(NamedTuple):
    """One message. `carried[i]` are the ranks, as a bit mask, whose contributions are in the unit `chunk.start + i`.

    It goes in `round`, and is added to the receiver's chunk, or replaces it, at the end of the round `taken`, which is
    later where the receiver was not so far yet. `begin` and `end` are in seconds since the collective began: its first
    byte leaves, its last has come.
    """

    sender: int
    receiver: int
    chunk: Chunk
    reduce: bool
    carried: tuple[int, ...]
    nbytes: int
    round: int
    taken: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Story:
    """All messages of a collective, by round; `cost` is the simulated one."""

    spec: Spec
    bounds: tuple[tuple[int, int], ...]
    transfers: tuple[Transfer, ...]
    rounds: int
    cost: Cost


def tell(
    spec: Spec,
    schedule: Callable[[int], Iterable[Step]],
    bounds: Sequence[tuple[int, int]],
    link: Callable[[int, int], Link],
    gamma: float,
) -> Story:
    """The story of `schedule`, whose unit `u` is the bytes `bounds[u]`, on links as in `simulate`.

    Raises `ScheduleError` where messages do not match, as `verify` does, which proves more."""
    steps = [list(schedule(rank)) for rank in range(spec.size)]
    matched = matched_messages(spec, steps)
    times, cost = _times(spec.size, schedule, bounds, link, gamma)
    turns = _turns(steps)
    ready = [0] * spec.size  # the first round that a rank has not come to the end of
    free = [0] * spec.size  # the first round in which it has sent nothing
    rounds: dict[tuple[int, int], int] = {}  # in which each rank sends each of its steps
    held = [[1 << rank if rank in spec.sources[u] else 0 for u in range(spec.units)] for rank in range(spec.size)]
    in_flight: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def post(rank: int, index: int) -> None:
        for at, op in enumerate(steps[rank][index] if index < len(steps[rank]) else ()):
            if isinstance(op, Send):
                rounds[rank, index] = max(ready[rank], free[rank])
                in_flight[rank, index, at] = tuple(held[rank][op.chunk.start : op.chunk.stop])
        if (rank, index) in rounds:
            free[rank] = rounds[rank, index] + 1

    for rank in range(spec.size):
        post(rank, 0)
    transfers = []
    for rank, index in finishing_order(spec, steps, matched):
        received = [(op, matched[rank, index, at]) for at, op in enumerate(steps[rank][index]) if isinstance(op, Recv)]
        ready[rank] = max([ready[rank], *(rounds[message.sender, message.step] + 1 for _, message in received)])
        for op, message in received:
            carried = in_flight.pop((message.sender, message.step, message.op))
            for u, mask in zip(op.chunk.units, carried, strict=True):
                held[rank][u] = held[rank][u] | mask if op.reduce else mask
            nbytes = sum(bounds[u][1] - bounds[u][0] for u in op.chunk.units)
            begin, end = times[op.peer, rank][turns[message.sender, message.step, message.op]]
            sent = rounds[message.sender, message.step]
            taken = max(sent, ready[rank] - 1)
            transfers.append(Transfer(op.peer, rank, op.chunk, op.reduce, carried, nbytes, sent, taken, begin, end))
        post(rank, index + 1)
    transfers.sort(key=lambda one: (one.round, one.begin, one.sender, one.receiver, one.chunk))
    return Story(spec, tuple(bounds), tuple(transfers), max(ready, default=0), cost)


def _times(
    size: int,
    schedule: Callable[[int], Iterable[Step]],
    bounds: Sequence[tuple[int, int]],
    link: Callable[[int, int], Link],
    gamma: float,
) -> tuple[dict[tuple[int, int], list[tuple[float, float]]], Cost]:
    """When each message from one rank to another begins and ends, in their order, and what all cost."""
    times: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    simulation = Simulation(size, [Job(schedule, bounds, [0.0] * size)], link, gamma, 0.0)
    simulation.journal = lambda sender, receiver, begin, end: times[sender, receiver].append((begin, end))
    cost, _ = simulation.run()
    return times, cost


def _turns(steps: Sequence[Sequence[Step]]) -> dict[tuple[int, int, int], int]:
    """The number of each send (rank, step, operation) among those to the same peer."""
    turns = {}
    sent: dict[tuple[int, int], int] = defaultdict(int)
    for rank, of_rank in enumerate(steps):
        for index, step in enumerate(of_rank):
            for at, op in enumerate(step):
                if isinstance(op, Send):
                    turns[rank, index, at] = sent[rank, op.peer]
                    sent[rank, op.peer] += 1
    return turns
