"""Predicts the time of a schedule: simulates its steps on links with α, β and λ and processors with γ.

The model is the usual one (Thakur, Rabenseifner and Gropp 2005): a message of b bytes costs α + βb, reducing b
bytes costs γb, and a rank can send one message and receive one message at the same time. A link may also have a
latency λ, during which no rank is busy, as in LogP (Culler et al. 1993), so the latencies of the messages of one step
overlap. The simulated steps are those that the verifier proves and the executor runs; the closed forms only serve
to check the results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ringred.errors import DeadlockError
from ringred.schedule.ir import Send, Step, fold_groups
from ringred.schedule.lower import lower
from ringred.schedule.program import Fold, PostSend, Take

__all__ = ["Cost", "Link", "simulate"]

Link: TypeAlias = tuple[float, float] | tuple[float, float, float]
"""One direction between two ranks: α in seconds per message, β in seconds per byte and λ in seconds (0 if absent)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Simulated time in seconds until the last rank is done; messages and bytes of the busiest rank."""

    seconds: float
    messages: int
    bytes_sent: int
    bytes_received: int


class _Sending(NamedTuple):
    peer: int
    nbytes: int


class _Receiving(NamedTuple):
    peers: tuple[int, ...]
    nbytes: int
    reduce: bool


def simulate(
    size: int,
    schedule: Callable[[int], Iterable[Step]],
    bounds: Sequence[tuple[int, int]],
    link: Callable[[int, int], Link],
    gamma: float,
    *,
    segment: int | None = None,
) -> Cost:
    """The cost of `schedule` run by `size` ranks on a buffer whose unit `u` is the bytes `bounds[u]`.

    `link(sender, receiver)` gives α, β and λ, `gamma` is in seconds per reduced byte. With `segment`, messages
    are cut to that many bytes and pipelined as the executor does; without, each is sent whole.
    """
    if segment is None:
        events = [_whole(schedule(rank), bounds) for rank in range(size)]
    else:
        events = [_segmented(rank, schedule(rank), bounds, segment) for rank in range(size)]
    clock, send_port, receive_port = [0.0] * size, [0.0] * size, [0.0] * size
    messages, sent, received = [0] * size, [0] * size, [0] * size
    on_the_way: dict[tuple[int, int], deque[float]] = {}
    waiting: dict[int, _Receiving] = {}
    wanted_by: dict[tuple[int, int], int] = {}
    runnable = deque(range(size))
    finished = 0
    while runnable:
        rank = runnable.popleft()
        event = waiting.pop(rank, None) or next(events[rank], None)
        while event is not None:
            if isinstance(event, _Sending):
                alpha, beta, *_ = link(rank, event.peer)
                start = max(clock[rank], send_port[rank])
                send_port[rank] = start + alpha + beta * event.nbytes
                messages[rank] += 1
                sent[rank] += event.nbytes
                pair = (rank, event.peer)
                on_the_way.setdefault(pair, deque()).append(start)
                if pair in wanted_by:
                    runnable.append(wanted_by.pop(pair))
            else:
                absent = next((peer for peer in event.peers if not on_the_way.get((peer, rank))), None)
                if absent is not None:
                    waiting[rank] = event
                    wanted_by[absent, rank] = rank
                    break
                # The port receives messages in the order of arrival, in whatever order they are added afterwards.
                arrivals = []
                for peer in event.peers:
                    alpha, beta, *latency = link(peer, rank)
                    arrivals.append((on_the_way[peer, rank].popleft() + sum(latency), alpha + beta * event.nbytes))
                for arrival, takes in sorted(arrivals):
                    receive_port[rank] = max(arrival, receive_port[rank]) + takes
                    received[rank] += event.nbytes
                clock[rank] = max(clock[rank], receive_port[rank])
                if event.reduce:
                    clock[rank] += gamma * event.nbytes * len(event.peers)
            event = next(events[rank], None)
        else:
            finished += 1
    if finished < size:
        raise DeadlockError(f"simulation of {size} ranks: {size - finished} of them wait for ever")
    ends = [max(times) for times in zip(clock, send_port, strict=True)]
    return Cost(max(ends, default=0.0), max(messages), max(sent), max(received))


def _whole(steps: Iterable[Step], bounds: Sequence[tuple[int, int]]) -> Iterator[_Sending | _Receiving]:
    """The events of one rank, message by message, generated as needed: cheap even for thousands of ranks."""
    for step in steps:
        for op in step:
            if isinstance(op, Send):
                yield _Sending(op.peer, sum(bounds[u][1] - bounds[u][0] for u in op.chunk.units))
        for chunk, reduce, peers in fold_groups(step):
            yield _Receiving(tuple(peers), sum(bounds[u][1] - bounds[u][0] for u in chunk.units), reduce)


def _segmented(
    rank: int, steps: Iterable[Step], bounds: Sequence[tuple[int, int]], segment: int
) -> Iterator[_Sending | _Receiving]:
    """The events of one rank, segment by segment, from the very program that the executor would run."""
    for instruction in lower(rank, steps, bounds, segment).instructions:
        if isinstance(instruction, PostSend):
            yield _Sending(instruction.peer, instruction.hi - instruction.lo)
        elif isinstance(instruction, Fold):
            yield _Receiving(instruction.peers, instruction.hi - instruction.lo, True)
        elif isinstance(instruction, Take):
            yield _Receiving((instruction.peer,), instruction.hi - instruction.lo, False)
