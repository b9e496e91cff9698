"""Simulates the collectives of a training step where ranks share what they use: queues on the way, with rates and
bursts, and processors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import NamedTuple, TypeAlias

from ringred.schedule.cost import Begin, Cost, End, Event, Job, Link, OnTheWay, Posting, Receiving, Sending, Simulation

__all__ = ["Port", "Ports", "simulate_jobs"]


class Port(NamedTuple):
    """A place that messages pass one after the other, at `beta` seconds a byte. After a pause, up to `burst` bytes pass
    at once, as in a queue with a token bucket. A message that has to wait for one that came from elsewhere takes
    `crowded` times as long, until `settled` bytes have passed without a pause."""

    number: int
    beta: float
    burst: float = 0.0
    crowded: float = 1.0
    settled: float = math.inf


Ports: TypeAlias = Callable[[int, int], tuple[Sequence[Port], Sequence[Port]]]
"""The ports that a message passes on its way, from a sender to a receiver: those that it leaves by and those that it
arrives by."""


def simulate_jobs(
    size: int,
    jobs: Sequence[Job],
    link: Callable[[int, int], Link],
    gamma: float,
    *,
    ports: Ports | None = None,
    call: float = 0.0,
    cores: int = 0,
    copy: float = 0.0,
) -> tuple[Cost, list[tuple[float, float]]]:
    """The cost of `jobs`, which every rank does one after the other, each when it has its data; a job takes `call`
    seconds beside its messages. With it the time at which the first rank began each job, and the last was done.

    Without `ports` each rank sends and receives by ports of its own, with the β of the link, and α is part of a port's
    time. With them, which many may share, of a link only α and λ count; each message takes α and `copy` seconds a byte
    of a processor at its sender and at its receiver (β, where it passes no port: within a host); with `cores`, all
    ranks share that many processors, as they do on one machine.
    """
    if ports is None:
        return Simulation(size, jobs, link, gamma, call).run()
    return _Network(size, jobs, link, gamma, call, ports, cores or size, copy).run()


class _Arriving(NamedTuple):
    """The first byte of a step's messages is there. Seconds of a processor: `copying` while the others come, until
    `last` or longer, and `then`."""

    copying: float
    last: float
    then: float


class _Working(NamedTuple):
    seconds: float


_Happening: TypeAlias = Event | _Arriving | _Working


class _Message(NamedTuple):
    sender: int
    receiver: int
    nbytes: int
    way: OnTheWay


class _Network(Simulation):
    """A simulation in which ranks share ports and processors. What takes a port or a processor happens in the order of
    its time, so that both serve who comes first."""

    def __init__(
        self,
        size: int,
        jobs: Sequence[Job],
        link: Callable[[int, int], Link],
        gamma: float,
        call: float,
        ports: Ports,
        cores: int,
        copy: float,
    ) -> None:
        super().__init__(size, jobs, link, gamma, call)
        self.ports, self.copy = ports, copy
        self.cores = [0.0] * cores  # when each processor is free
        self.owed: dict[int, float] = {}  # by port: when it has passed all, at its rate
        self.served: dict[int, int] = {}  # by port: the first port of the message that it passed last
        self.in_a_row: dict[int, int] = {}  # by port: the bytes that it passed without a pause
        self.posted = any(job.posted for job in jobs)
        self.posts: dict[tuple[int, int], deque[float]] = {}  # when receives were posted that wait for their messages
        self.held: dict[tuple[int, int], deque[_Message]] = {}  # messages that wait for their receives
        self.holding = [0] * size  # how many of each sender's
        self.ending: set[int] = set()  # senders whose job ends once none is held
        self.pending: list[_Happening | None] = []
        self.heap: list[tuple[float, int, int | _Message]] = []
        self.order = count()

    def _finished(self) -> int:
        self.pending = [next(events, None) for events in self.events]
        self.woken = lambda rank: self._at(self.clock[rank], rank)
        for rank in range(self.size):
            self.woken(rank)
        while self.heap:
            _, _, what = heappop(self.heap)
            if isinstance(what, _Message):
                self._arrives(what)
                continue
            event = self.pending[what]
            if event is None:
                continue
            self.pending[what] = None
            if not self._happens(what, event):
                self.pending[what] = event
                continue
            if self.pending[what] is None:
                self.pending[what] = next(self.events[what], None)
            self.woken(what)
        return sum(event is None for event in self.pending)

    def _at(self, time: float, what: int | _Message) -> None:
        heappush(self.heap, (time, next(self.order), what))

    def _happens(self, rank: int, event: _Happening) -> bool:
        if isinstance(event, Sending):
            self._send(rank, event)
        elif isinstance(event, _Arriving):
            self._work(rank, event.copying)
            self.clock[rank] = max(self.clock[rank], event.last)
            self.pending[rank] = _Working(event.then)
        elif isinstance(event, _Working):
            self._work(rank, event.seconds)
        elif isinstance(event, Begin):
            super()._happens(rank, event)
            self.pending[rank] = _Working(self.call)
        elif isinstance(event, Posting):
            self._post(rank, event.peer)
        elif isinstance(event, End) and self.holding[rank]:
            self.ending.add(rank)
            return False
        else:
            return super()._happens(rank, event)
        return True

    def _begin_call(self, rank: int) -> None:
        """A processor is taken when the rank's time has come."""

    def _work(self, rank: int, seconds: float) -> float:
        """Takes a processor for as long; returns since when."""
        if not seconds:
            return self.clock[rank]
        begin = max(self.clock[rank], heappop(self.cores))
        self.clock[rank] = begin + seconds
        heappush(self.cores, self.clock[rank])
        return begin

    def _send(self, rank: int, event: Sending) -> None:
        alpha, beta, *_ = self.link(rank, event.peer)
        ports, _ = self.ports(rank, event.peer)
        began = self._work(rank, alpha + (self.copy if ports else beta) * event.nbytes)
        self.messages[rank] += 1
        self.sent[rank] += event.nbytes
        message = _Message(rank, event.peer, event.nbytes, OnTheWay(began + alpha, self.clock[rank]))
        if not self.posted:
            self._leaves(message, -math.inf)
        elif posts := self.posts.get((rank, event.peer)):
            self._leaves(message, posts.popleft())
        else:
            self.held.setdefault((rank, event.peer), deque()).append(message)
            self.holding[rank] += 1

    def _post(self, rank: int, peer: int) -> None:
        pair = (peer, rank)
        if not self.held.get(pair):
            self.posts.setdefault(pair, deque()).append(self.clock[rank])
            return
        self._leaves(self.held[pair].popleft(), self.clock[rank])
        self.holding[peer] -= 1
        if not self.holding[peer] and peer in self.ending:
            self.ending.remove(peer)
            self.woken(peer)

    def _leaves(self, message: _Message, posted: float) -> None:
        """No byte leaves before the sender has heard that its receive was posted."""
        _, _, *rest = self.link(message.sender, message.receiver)
        latency = sum(rest[:1])
        known = posted + latency
        way = OnTheWay(max(message.way.first, known), max(message.way.last, known))
        ports, _ = self.ports(message.sender, message.receiver)
        for port in ports:
            way = self._pass(port, way, message.nbytes, ports[0].number)
        self.send_port[message.sender] = max(self.send_port[message.sender], way.last)
        later = OnTheWay(way.first + latency, way.last + latency)
        self._at(later.first, message._replace(way=later))

    def _arrives(self, message: _Message) -> None:
        way, pair = message.way, (message.sender, message.receiver)
        leaving, arriving = self.ports(*pair)
        for port in arriving:
            way = self._pass(port, way, message.nbytes, leaving[0].number)
        self.on_the_way.setdefault(pair, deque()).append(way)
        if pair in self.wanted_by:
            self.woken(self.wanted_by.pop(pair))

    def _pass(self, port: Port, way: OnTheWay, nbytes: int, came_by: int) -> OnTheWay:
        number = port.number
        owed = self.owed.get(number, -math.inf)
        first = max(way.first, owed)
        before = self.in_a_row[number] if owed > way.first else 0
        crowded = 0 < before < port.settled and self.served[number] != came_by
        beta = port.beta * (port.crowded if crowded else 1.0)
        passed = max(owed, way.first - port.burst * port.beta) + beta * nbytes
        self.owed[number], self.served[number], self.in_a_row[number] = passed, came_by, before + nbytes
        return OnTheWay(first, max(first, way.last, passed))

    def _receive(self, rank: int, event: Receiving) -> None:
        ways = [self.on_the_way[peer, rank].popleft() for peer in event.peers]
        last = max(self.clock[rank], *(way.last for way in ways))
        self.clock[rank] = max(self.clock[rank], min(way.first for way in ways))
        then = copying = 0.0
        for peer in event.peers:
            alpha, beta, *_ = self.link(peer, rank)
            then += alpha + self.gamma * event.nbytes * event.reduce
            copying += (self.copy if self.ports(peer, rank)[1] else beta) * event.nbytes
        self.pending[rank] = _Arriving(copying, last, then)
