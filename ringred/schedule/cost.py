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
from heapq import heappop, heappush
from typing import NamedTuple, TypeAlias

from ringred.errors import DeadlockError
from ringred.schedule.ir import Send, Step, fold_groups
from ringred.schedule.lower import lower
from ringred.schedule.program import Fold, PostSend, Take

__all__ = ["Cost", "Job", "Link", "Port", "Ports", "simulate", "simulate_jobs"]

Link: TypeAlias = tuple[float, float] | tuple[float, float, float]
"""One direction between two ranks: α in seconds per message, β in seconds per byte and λ in seconds (0 if absent)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Simulated time in seconds until the last rank is done; messages and bytes of the busiest rank."""

    seconds: float
    messages: int
    bytes_sent: int
    bytes_received: int


class Port(NamedTuple):
    """A place that messages pass one after the other, at `beta` seconds a byte. After a pause, up to `burst` bytes pass
    at once, as in a queue with a token bucket."""

    number: int
    beta: float
    burst: float = 0.0


Ports: TypeAlias = Callable[[int, int], tuple[Sequence[Port], Sequence[Port]]]
"""The ports that a message passes on its way, from a sender to a receiver: those that it leaves by and those that it
arrives by."""


@dataclass(frozen=True, slots=True)
class Job:
    """A collective of a training step: its schedule, the bytes of its units, and when each rank has its data, in
    seconds since the step began. With `segment`, messages are cut as in `simulate`."""

    schedule: Callable[[int], Iterable[Step]]
    bounds: Sequence[tuple[int, int]]
    ready: Sequence[float]
    segment: int | None = None


class _Begin(NamedTuple):
    job: int
    ready: float


class _End(NamedTuple):
    job: int


class _Sending(NamedTuple):
    peer: int
    nbytes: int


class _Receiving(NamedTuple):
    peers: tuple[int, ...]
    nbytes: int
    reduce: bool


class _Arrived(NamedTuple):
    busy: float  # seconds of a processor that it takes to receive and to reduce


_Event: TypeAlias = _Begin | _End | _Sending | _Receiving | _Arrived


class _OnTheWay(NamedTuple):
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

    `link(sender, receiver)` gives α, β and λ, `gamma` is in seconds per reduced byte. With `segment`, messages
    are cut to that many bytes and pipelined as the executor does; without, each is sent whole.
    """
    cost, _ = simulate_jobs(size, [Job(schedule, bounds, [0.0] * size, segment)], link, gamma)
    return cost


def simulate_jobs(
    size: int,
    jobs: Sequence[Job],
    link: Callable[[int, int], Link],
    gamma: float,
    *,
    ports: Ports | None = None,
    call: float = 0.0,
    cores: int = 0,
) -> tuple[Cost, list[tuple[float, float]]]:
    """The cost of `jobs`, which every rank does one after the other, each when it has its data; a job takes `call`
    seconds beside its messages. With it the time at which the first rank began each job, and the last was done.

    Without `ports` each rank sends and receives by ports of its own, with the β of the link, and α is part of a port's
    time. With them, each message takes α of a processor at its sender and at its receiver; with `cores`, all ranks
    share that many processors, as they do on one machine.
    """
    if ports is None:
        return _Simulation(size, jobs, link, gamma, call).run()
    return _Network(size, jobs, link, gamma, call, ports, cores or size).run()


class _Simulation:
    """State of one simulation, in which each rank has ports of its own; all times are in seconds since it began."""

    def __init__(
        self, size: int, jobs: Sequence[Job], link: Callable[[int, int], Link], gamma: float, call: float
    ) -> None:
        self.size, self.link, self.gamma, self.call = size, link, gamma, call
        self.events = [self._of(rank, jobs) for rank in range(size)]
        self.clock, self.send_port, self.receive_port = [0.0] * size, [0.0] * size, [0.0] * size
        self.messages, self.sent, self.received = [0] * size, [0] * size, [0] * size
        self.on_the_way: dict[tuple[int, int], deque[_OnTheWay]] = {}
        self.wanted_by: dict[tuple[int, int], int] = {}
        self.times = [(math.inf, 0.0)] * len(jobs)
        self.woken: Callable[[int], None] = lambda rank: None

    @staticmethod
    def _of(rank: int, jobs: Sequence[Job]) -> Iterator[_Event]:
        for number, job in enumerate(jobs):
            yield _Begin(number, job.ready[rank])
            if job.segment is None:
                yield from _whole(job.schedule(rank), job.bounds)
            else:
                yield from _segmented(rank, job.schedule(rank), job.bounds, job.segment)
            yield _End(number)

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
        waiting: dict[int, _Event] = {}
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

    def _happens(self, rank: int, event: _Event) -> bool:
        """Lets an event happen, unless it has to wait for a message."""
        clock = self.clock
        if isinstance(event, _Sending):
            self.messages[rank] += 1
            self.sent[rank] += event.nbytes
            pair = (rank, event.peer)
            self.on_the_way.setdefault(pair, deque()).append(self._sent(rank, event))
            if pair in self.wanted_by:
                self.woken(self.wanted_by.pop(pair))
        elif isinstance(event, _Receiving):
            absent = next((peer for peer in event.peers if not self.on_the_way.get((peer, rank))), None)
            if absent is not None:
                self.wanted_by[absent, rank] = rank
                return False
            self.received[rank] += event.nbytes * len(event.peers)
            self._receive(rank, event)
        elif isinstance(event, _Begin):
            clock[rank] = max(clock[rank], event.ready)
            self.times[event.job] = min(self.times[event.job][0], clock[rank]), self.times[event.job][1]
            self._work(rank, self.call)
        elif isinstance(event, _End):
            clock[rank] = max(clock[rank], self.send_port[rank])
            self.times[event.job] = self.times[event.job][0], max(self.times[event.job][1], clock[rank])
        return True

    def _work(self, rank: int, seconds: float) -> None:
        """The processor of `rank` is busy."""
        self.clock[rank] += seconds

    def _sent(self, rank: int, event: _Sending) -> _OnTheWay:
        alpha, beta, *_ = self.link(rank, event.peer)
        start = max(self.clock[rank], self.send_port[rank])
        self.send_port[rank] = start + alpha + beta * event.nbytes
        return _OnTheWay(start, start)

    def _receive(self, rank: int, event: _Receiving) -> None:
        # The port receives messages in the order of arrival, in whatever order they are added afterwards.
        arrivals = []
        for peer in event.peers:
            alpha, beta, *latency = self.link(peer, rank)
            arrivals.append((self.on_the_way[peer, rank].popleft().first + sum(latency), alpha, beta))
        for arrival, alpha, beta in sorted(arrivals):
            self.receive_port[rank] = max(arrival, self.receive_port[rank]) + alpha + beta * event.nbytes
        self.clock[rank] = max(self.clock[rank], self.receive_port[rank])
        if event.reduce:
            self.clock[rank] += self.gamma * event.nbytes * len(event.peers)


class _Network(_Simulation):
    """A simulation in which ranks share ports and processors. Events happen in the order of their times, so that both
    serve who comes first."""

    def __init__(
        self,
        size: int,
        jobs: Sequence[Job],
        link: Callable[[int, int], Link],
        gamma: float,
        call: float,
        ports: Ports,
        cores: int,
    ) -> None:
        super().__init__(size, jobs, link, gamma, call)
        self.ports, self.cores = ports, [0.0] * cores  # when each processor is free
        self.owed: dict[int, float] = {}  # by port: when it has passed all, at its rate
        self.pending: list[_Event | None] = []

    def _finished(self) -> int:
        heap = [(0.0, rank) for rank in range(self.size)]
        self.pending = [next(events, None) for events in self.events]
        self.woken = lambda rank: heappush(heap, (self.clock[rank], rank))
        while heap:
            _, rank = heappop(heap)
            event = self.pending[rank]
            if event is None:
                continue
            self.pending[rank] = None
            if not self._happens(rank, event):
                self.pending[rank] = event
                continue
            if self.pending[rank] is None:
                self.pending[rank] = next(self.events[rank], None)
            heappush(heap, (self.clock[rank], rank))
        return sum(event is None for event in self.pending)

    def _happens(self, rank: int, event: _Event) -> bool:
        if isinstance(event, _Arrived):
            self._work(rank, event.busy)
            return True
        return super()._happens(rank, event)

    def _work(self, rank: int, seconds: float) -> None:
        begin = max(self.clock[rank], heappop(self.cores))
        self.clock[rank] = begin + seconds
        heappush(self.cores, self.clock[rank])

    def _sent(self, rank: int, event: _Sending) -> _OnTheWay:
        self._work(rank, self.link(rank, event.peer)[0])
        way = _OnTheWay(self.clock[rank], self.clock[rank])
        for port in self.ports(rank, event.peer)[0]:
            way = self._pass(port, way, event.nbytes)
        self.send_port[rank] = max(self.send_port[rank], way.last)
        return way

    def _pass(self, port: Port, way: _OnTheWay, nbytes: int) -> _OnTheWay:
        owed = self.owed.get(port.number, -math.inf)
        first = max(way.first, owed)
        passed = max(owed, way.first - port.burst * port.beta) + port.beta * nbytes
        self.owed[port.number] = passed
        return _OnTheWay(first, max(first, way.last, passed))

    def _receive(self, rank: int, event: _Receiving) -> None:
        # The ports pass messages in the order of arrival, in whatever order they are added afterwards.
        arrivals, busy = [], 0.0
        for peer in event.peers:
            alpha, _, *latency = self.link(peer, rank)
            busy += alpha + self.gamma * event.nbytes * event.reduce
            first, last = self.on_the_way[peer, rank].popleft()
            arrivals.append((first + sum(latency), last + sum(latency), peer))
        for first, last, peer in sorted(arrivals):
            way = _OnTheWay(first, last)
            for port in self.ports(peer, rank)[1]:
                way = self._pass(port, way, event.nbytes)
            self.clock[rank] = max(self.clock[rank], way.last)
        self.pending[rank] = _Arrived(busy)


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
