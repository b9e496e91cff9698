"""A policy in simulated time: how long updates take, how stale gradients are, how much work is thrown away."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringred.errors import PolicyError
from ringred.parameter_server.policies import Decision, Gradient, Policy
from ringred.parameter_server.times import Times

__all__ = ["Event", "Simulated", "simulate"]

_BLOCK = 4096  # mini-batch times drawn at once


class Event(NamedTuple):
    """At `time` seconds `worker` dies or comes (back)."""

    time: float
    kind: Literal["left", "joined"]
    worker: int


@dataclass(frozen=True)
class Simulated:
    """What happened.

    `update_times`: float64 (updates,), the seconds at which each update happened. `staleness`: int64, of each applied
    gradient the updates between its pull and its use, in order of use. `mini_batches`: how many were finished;
    `cancelled` and `dropped`: thrown away unfinished and finished. `waiting`: the part of the workers' time in which
    they waited to be released.
    """

    update_times: NDArray[np.float64]
    staleness: NDArray[np.int64]
    mini_batches: int
    cancelled: int
    dropped: int
    waiting: float

    @property
    def between(self) -> NDArray[np.float64]:
        """The seconds from each update to the next; the first is from the start."""
        return np.diff(self.update_times, prepend=0.0)

    @property
    def time_per_update(self) -> float:
        return float(self.update_times[-1] / len(self.update_times))

    @property
    def mean_staleness(self) -> float:
        return float(self.staleness.mean())

    @property
    def distribution(self) -> NDArray[np.float64]:
        """Of the applied gradients the part that was 0, 1, 2, ... updates stale."""
        return np.bincount(self.staleness) / len(self.staleness)


def simulate(
    policy: Policy, workers: int, times: Times, updates: int, *, seed: int = 0, events: tuple[Event, ...] = ()
) -> Simulated:
    """Runs a copy of `policy` until it has made `updates` updates: pushing and pulling take no time.

    Raises what the policy raises, and `PolicyError` if no worker is left to push.
    """
    return _Simulation(copy.deepcopy(policy), workers, times, seed, events).run(updates)


class _Simulation:
    """Events wait in `queue` as (time, number, worker, life): a cancelled mini-batch's event has an old life."""

    def __init__(self, policy: Policy, workers: int, times: Times, seed: int, events: tuple[Event, ...]) -> None:
        self.policy = policy
        self.times = times
        self.generator = np.random.default_rng(seed)
        self.queue: list[tuple[float, int, int, int]] = []
        self.number = 0
        self.now = 0.0
        self.idle_since: dict[int, float] = {}
        self.lives: dict[int, int] = {}
        self.versions: dict[int, int] = {}
        self.sequences: dict[int, int] = {}
        self.durations: dict[int, Iterator[float]] = {}
        self.waited = 0.0
        self.finished = self.cancelled = self.dropped = 0
        self.update_times: list[float] = []
        self.staleness: list[int] = []
        self.events = sorted(events)
        for at, event in enumerate(self.events):
            heappush(self.queue, (event.time, -len(self.events) + at, -1 - at, 0))
        self.follow(policy.start(range(workers)))

    def run(self, updates: int) -> Simulated:
        while len(self.update_times) < updates:
            if not self.queue:
                raise PolicyError(f"{self.policy}: after {self.now:.6g} s all {len(self.idle_since)} workers wait")
            self.now, _, worker, life = heappop(self.queue)
            if worker < 0:
                self.happen(self.events[-1 - worker])
            elif self.lives[worker] == life:
                self.finish(worker)
        workers = max(1, len(self.sequences))
        return Simulated(
            np.array(self.update_times[:updates]),
            np.array(self.staleness, dtype=np.int64),
            self.finished,
            self.cancelled,
            self.dropped,
            self.waited / (self.now * workers) if self.now else 0.0,
        )

    def happen(self, event: Event) -> None:
        if event.kind == "left":
            self.lives[event.worker] = self.lives.get(event.worker, 0) + 1
            self.idle_since.pop(event.worker, None)
            self.follow(self.policy.left(event.worker))
        else:
            self.follow(self.policy.joined(event.worker))

    def finish(self, worker: int) -> None:
        self.finished += 1
        self.lives[worker] += 1
        self.idle_since[worker] = self.now
        sequence = self.sequences[worker]
        self.sequences[worker] = sequence + 1
        self.follow(self.policy.pushed(Gradient(worker, sequence, self.versions[worker])))

    def follow(self, decision: Decision) -> None:
        if decision.apply:
            before = self.policy.version - 1
            self.update_times.append(self.now)
            self.staleness += [before - gradient.version for gradient in decision.apply]
        self.dropped += len(decision.drop)
        self.cancelled += len(decision.cancel)
        for worker in decision.cancel:
            self.lives[worker] += 1
        for worker in decision.release:
            self.waited += self.now - self.idle_since.pop(worker, self.now)
            self.versions[worker] = self.policy.version
            self.sequences.setdefault(worker, 0)
            self.number += 1
            finishes = self.now + self.duration(worker)
            heappush(self.queue, (finishes, self.number, worker, self.lives.setdefault(worker, 0)))

    def duration(self, worker: int) -> float:
        if worker not in self.durations:
            self.durations[worker] = self._drawn(worker)
        return next(self.durations[worker])

    def _drawn(self, worker: int) -> Iterator[float]:
        while True:
            yield from self.times.sample(self.generator, worker, _BLOCK).tolist()
