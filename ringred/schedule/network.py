"""Simulates the collectives of a training step where ranks share what they use: queues on the way, with rates and
bursts, and processors."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
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
    ranks share that many processors, as they do on one machine. What is `posted` is copied by the one thread of its
    sender's transport, when it may leave; else by the rank itself, when it sends.
    """
    if ports is None:
        return Simulation(size, jobs, link, gamma, call).run()
    return _Network(size, jobs, link, gamma, call, ports, cores or 2 * size, copy).run()  # a rank's, and its thread's


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
    """On `way` to its sender's first port, and then to its receiver's."""

    sender: int
    receiver: int
    nbytes: int
    way: OnTheWay


class _Network(Simulation):
    """A simulation in which ranks share ports and processors. What takes a processor, or the first port on either side,
    happens in the order of its time, so that they serve who comes first."""

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
        self.threads: list[deque[_Message]] = [deque() for _ in range(size)]  # what each transport's thread is to copy
        self.holding = [0] * size  # how many of each sender's have not left
        self.ending: set[int] = set()  # senders whose job ends once none is held
        self.pending: list[_Happening | None] = []
        self.heap: list[tuple[float, int, int | Callable[[], None]]] = []  # a rank's next event, or what else happens
        self.order = count()

    def _finished(self) -> int:
        self.pending = [next(events, None) for events in self.events]
        self.woken = lambda rank: self._at(self.clock[rank], rank)
        for rank in range(self.size):
            self.woken(rank)
        while self.heap:
            _, _, what = heappop(self.heap)
            if not isinstance(what, int):
                what()
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

    def _at(self, time: float, what: int | Callable[[], None]) -> None:
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
        began, self.clock[rank] = self._processor(self.clock[rank], seconds)
        return began

    def _processor(self, since: float, seconds: float) -> OnTheWay:
        """The time that a processor takes for as long, once one is free."""
        began = max(since, heappop(self.cores))
        heappush(self.cores, began + seconds)
        return OnTheWay(began, began + seconds)

    def _send(self, rank: int, event: Sending) -> None:
        alpha, *_ = self.link(rank, event.peer)
        self.messages[rank] += 1
        self.sent[rank] += event.nbytes
        self.holding[rank] += 1
        if not self.posted:
            began = self._work(rank, alpha + self._copying(rank, event.peer, event.nbytes))
            self._leaves_at(_Message(rank, event.peer, event.nbytes, OnTheWay(began + alpha, self.clock[rank])))
            return
        self._work(rank, alpha)
        message = _Message(rank, event.peer, event.nbytes, OnTheWay(self.clock[rank], self.clock[rank]))
        if posts := self.posts.get((rank, event.peer)):
            self._may_leave(message, posts.popleft())
        else:
            self.held.setdefault((rank, event.peer), deque()).append(message)

    def _post(self, rank: int, peer: int) -> None:
        if held := self.held.get((peer, rank)):
            self._may_leave(held.popleft(), self.clock[rank])
        else:
            self.posts.setdefault((peer, rank), deque()).append(self.clock[rank])

    def _may_leave(self, message: _Message, posted: float) -> None:
        """No byte leaves before the sender has heard that its receive was posted."""
        known = max(message.way.first, posted + self._latency(message.sender, message.receiver))
        self._at(known, partial(self._for_thread, message, known))

    def _for_thread(self, message: _Message, now: float) -> None:
        thread = self.threads[message.sender]
        thread.append(message)
        if len(thread) == 1:
            self._copies(message.sender, now)

    def _copies(self, sender: int, now: float) -> None:
        """The thread begins with the next message."""
        message, way = self.threads[sender][0], OnTheWay(now, now)
        if seconds := self._copying(sender, message.receiver, message.nbytes):
            way = self._processor(now, seconds)
        self._leaves_at(message._replace(way=way))
        self._at(way.last, partial(self._copied, sender, way.last))

    def _copied(self, sender: int, now: float) -> None:
        self.threads[sender].popleft()
        if self.threads[sender]:
            self._copies(sender, now)

    def _copying(self, sender: int, receiver: int, nbytes: int) -> float:
        _, beta, *_ = self.link(sender, receiver)
        ports, _ = self.ports(sender, receiver)
        return (self.copy if ports else beta) * nbytes

    def _latency(self, sender: int, receiver: int) -> float:
        _, _, *rest = self.link(sender, receiver)
        return sum(rest[:1])

    def _leaves_at(self, message: _Message) -> None:
        self._at(message.way.first, partial(self._leaves, message))

    def _leaves(self, message: _Message) -> None:
        sender, way = message.sender, message.way
        ports, _ = self.ports(sender, message.receiver)
        for port in ports:
            way = self._pass(port, way, message.nbytes, ports[0].number)
        self.send_port[sender] = max(self.send_port[sender], way.last)
        latency = self._latency(sender, message.receiver)
        later = OnTheWay(way.first + latency, way.last + latency)
        self._at(later.first, partial(self._arrives, message._replace(way=later)))
        self.holding[sender] -= 1
        if not self.holding[sender] and sender in self.ending:
            self.ending.remove(sender)
            self.woken(sender)

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
            alpha, *_ = self.link(peer, rank)
            then += alpha + self.gamma * event.nbytes * event.reduce
            copying += self._copying(peer, rank, event.nbytes)
        self.pending[rank] = _Arriving(copying, last, then)
