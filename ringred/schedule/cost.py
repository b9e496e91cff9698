"""Predicts the time of a schedule: simulates its steps on links with α, β and λ and processors with γ.

The model is the usual one (Thakur, Rabenseifner and Gropp 2005): a message of b bytes costs α + βb, reducing b
bytes costs γb, and a rank can send one message and receive one message at the same time. A link may also have a
latency λ, during which no rank is busy, as in LogP (Culler et al. 1993), so the latencies of the messages of one step
overlap. The simulated steps are those that the verifier proves and the executor runs; the closed forms only serve
to check the results.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

from ringred.errors import DeadlockError
from ringred.schedule.ir import Send, Step, fold_groups
from ringred.schedule.lower import lower
from ringred.schedule.order import in_step, turns
from ringred.schedule.program import Fold, PostReceive, PostSend, Program, Take

__all__ = [
    "Begin",
    "Cost",
    "End",
    "Event",
    "Job",
    "Link",
    "OnTheWay",
    "Posting",
    "Receiving",
    "Sending",
    "Simulation",
    "simulate",
]

Link: TypeAlias = tuple[float, float] | tuple[float, float, float] | tuple[float, float, float, float]
"""One direction between two ranks: α in seconds per message, β in seconds per byte and λ in seconds (0 if absent); and
the seconds per byte where the receiver waits at once for several senders with such links (β if absent). Where it turns
from one of them to another, a byte takes as long as between the two."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Simulated time in seconds until the last rank is done; messages and bytes of the busiest rank."""

    seconds: float
    messages: int
    bytes_sent: int
    bytes_received: int


@dataclass(frozen=True)  # without slots: `_cut` is kept
class Job:
    """A collective of a training step: its schedule, the bytes of its units, and when each rank has its data, in
    seconds since the step began. With `segment`, messages are cut as in `simulate`; with a `depth` of more than one
    they go in the order of a transport between hosts, see `lower`. With `posted` they leave once their receive is
    posted, where ports are simulated and all jobs of a simulation have a `segment` and are `posted`. What ranks do in a
    job is found out once; simulations of the same job share it."""

    schedule: Callable[[int], Iterable[Step]]
    bounds: Sequence[tuple[int, int]]
    ready: Sequence[float]
    segment: int | None = None
    depth: int = 1
    posted: bool = False

    def events(self, rank: int) -> Iterable[Sending | Posting | Receiving]:
        """Those of a rank, without `Begin` and `End`."""
        return _whole(self.schedule(rank), self.bounds) if self.segment is None else self._cut[rank]

    @cached_property
    def _cut(self) -> list[list[Sending | Posting | Receiving]]:
        """The events of each rank, segment by segment, from the very programs that the executor would run; waits for
        sends are left out."""
        assert self.segment is not None, "whole messages have no program"
        size, segment = len(self.ready), self.segment
        steps = [tuple(self.schedule(rank)) for rank in range(size)]
        steady = self.depth > 1 and in_step(steps.__getitem__, size)
        turning = turns(steps.__getitem__, size) if steady else frozenset()

        def program(rank: int) -> Program:
            return lower(rank, steps[rank], self.bounds, segment, in_parts=steady, depth=self.depth, turns=turning)

        return [list(_events_of(program(rank), self.posted)) for rank in range(size)]


class Begin(NamedTuple):
    job: int
    ready: float


class End(NamedTuple):
    job: int


class Sending(NamedTuple):
    peer: int
    nbytes: int


class Posting(NamedTuple):
    peer: int


class Receiving(NamedTuple):
    peers: tuple[int, ...]
    nbytes: int
    reduce: bool


Event: TypeAlias = Begin | End | Sending | Posting | Receiving


class OnTheWay(NamedTuple):
    """When the first byte of a message has left its sender, and when the last has."""

    first: float
    last: float


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

    `link(sender, receiver)` gives a `Link`, `gamma` is in seconds per reduced byte. With `segment`, messages
    are cut to that many bytes and pipelined as the executor does; without, each is sent whole.
    """
    cost, _ = Simulation(size, [Job(schedule, bounds, [0.0] * size, segment)], link, gamma, 0.0).run()
    return cost


class Simulation:
    """State of one simulation, in which each rank has ports of its own; all times are in seconds since it began."""

    def __init__(
        self, size: int, jobs: Sequence[Job], link: Callable[[int, int], Link], gamma: float, call: float
    ) -> None:
        if any(len(job.ready) != size for job in jobs):
            raise ValueError(f"expected jobs of {size} ranks, got {[len(job.ready) for job in jobs]}")
        self.size, self.link, self.gamma, self.call = size, link, gamma, call
        self.events = [self._of(rank, jobs) for rank in range(size)]
        self.clock, self.send_port, self.receive_port = [0.0] * size, [0.0] * size, [0.0] * size
        self.messages, self.sent, self.received = [0] * size, [0] * size, [0] * size
        self.heard = [-1] * size  # whose message, by such a link, each rank has received last
        self.on_the_way: dict[tuple[int, int], deque[OnTheWay]] = {}
        self.wanted_by: dict[tuple[int, int], int] = {}
        self.times = [(math.inf, 0.0)] * len(jobs)
        self.woken: Callable[[int], None] = lambda rank: None
        self.journal: Callable[[int, int, float, float], None] | None = None
        """Called for each message: sender, receiver, when its first byte left, when its last had come."""

    def _of(self, rank: int, jobs: Sequence[Job]) -> Iterator[Event]:
        for number, job in enumerate(jobs):
            yield Begin(number, job.ready[rank])
            yield from job.events(rank)
            yield End(number)

    def run(self) -> tuple[Cost, list[tuple[float, float]]]:
        finished = self._finished()
        if finished < self.size:
            raise DeadlockError(f"simulation of {self.size} ranks: {self.size - finished} of them wait for ever")
        ends = [max(times) for times in zip(self.clock, self.send_port, strict=True)]
        cost = Cost(max(ends, default=0.0), max(self.messages), max(self.sent), max(self.received))
        return cost, self.times

    def _finished(self) -> int:
        """Runs each rank as far as it comes: enough where nothing is shared. Returns how many came to their ends."""
        runnable, finished = deque(range(self.size)), 0
        waiting: dict[int, Event] = {}
        self.woken = runnable.append
        while runnable:
            rank = runnable.popleft()
            event = waiting.pop(rank, None) or next(self.events[rank], None)
            while event is not None and self._happens(rank, event):
                event = next(self.events[rank], None)
            if event is None:
                finished += 1
            else:
                waiting[rank] = event
        return finished

    def _happens(self, rank: int, event: Event) -> bool:
        """Lets an event happen, unless it has to wait for a message."""
        clock = self.clock
        if isinstance(event, Sending):
            self.messages[rank] += 1
            self.sent[rank] += event.nbytes
            pair = (rank, event.peer)
            self.on_the_way.setdefault(pair, deque()).append(self._sent(rank, event))
            if pair in self.wanted_by:
                self.woken(self.wanted_by.pop(pair))
        elif isinstance(event, Receiving):
            absent = next((peer for peer in event.peers if not self.on_the_way.get((peer, rank))), None)
            if absent is not None:
                self.wanted_by[absent, rank] = rank
                return False
            self.received[rank] += event.nbytes * len(event.peers)
            self._receive(rank, event)
        elif isinstance(event, Begin):
            clock[rank] = max(clock[rank], event.ready)
            self.times[event.job] = min(self.times[event.job][0], clock[rank]), self.times[event.job][1]
            self._begin_call(rank)
        elif isinstance(event, End):
            clock[rank] = max(clock[rank], self.send_port[rank])
            self.times[event.job] = self.times[event.job][0], max(self.times[event.job][1], clock[rank])
        return True

    def _begin_call(self, rank: int) -> None:
        self.clock[rank] += self.call

    def _sent(self, rank: int, event: Sending) -> OnTheWay:
        alpha, beta, *_ = self.link(rank, event.peer)
        start = max(self.clock[rank], self.send_port[rank])
        self.send_port[rank] = start + alpha + beta * event.nbytes
        return OnTheWay(start, start)

    def _receive(self, rank: int, event: Receiving) -> None:
        # The port receives messages in the order of arrival, in whatever order they are added afterwards.
        arrivals = []
        links = [self.link(peer, rank) for peer in event.peers]
        crowded = sum(len(link) == 4 for link in links) > 1
        for peer, (alpha, beta, *rest) in zip(event.peers, links, strict=True):
            left = self.on_the_way[peer, rank].popleft().first
            if len(rest) == 2:
                turns = self.heard[rank] not in (-1, peer)
                beta = rest[1] if crowded else (beta + rest[1]) / 2 if turns else beta
                self.heard[rank] = peer
            arrivals.append((left + sum(rest[:1]), alpha, beta, left, peer))
        for arrival, alpha, beta, left, peer in sorted(arrivals):
            self.receive_port[rank] = max(arrival, self.receive_port[rank]) + alpha + beta * event.nbytes
            if self.journal is not None:
                self.journal(peer, rank, left, self.receive_port[rank])
        self.clock[rank] = max(self.clock[rank], self.receive_port[rank])
        if event.reduce:
            self.clock[rank] += self.gamma * event.nbytes * len(event.peers)


def _whole(steps: Iterable[Step], bounds: Sequence[tuple[int, int]]) -> Iterator[Sending | Receiving]:
    """The events of one rank, message by message, generated as needed: cheap even for thousands of ranks."""
    for step in steps:
        for op in step:
            if isinstance(op, Send):
                yield Sending(op.peer, sum(bounds[u][1] - bounds[u][0] for u in op.chunk.units))
        for chunk, reduce, peers in fold_groups(step):
            yield Receiving(tuple(peers), sum(bounds[u][1] - bounds[u][0] for u in chunk.units), reduce)


def _events_of(program: Program, posted: bool) -> Iterator[Sending | Posting | Receiving]:
    for instruction in program.instructions:
        if isinstance(instruction, PostSend):
            yield Sending(instruction.peer, instruction.hi - instruction.lo)
        elif isinstance(instruction, PostReceive):
            if posted:
                yield Posting(instruction.peer)
        elif isinstance(instruction, Fold):
            yield Receiving(instruction.peers, instruction.hi - instruction.lo, True)
        elif isinstance(instruction, Take):
            yield Receiving((instruction.peer,), instruction.hi - instruction.lo, False)
