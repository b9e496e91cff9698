"""The coordinator: knows the workers, asks the policy, and gives its decisions to all shards in one order.

A state machine like a shard: no socket, no clock. What it wants a shard to do is an `Order`, which is kept until the
shard has answered it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ringred.errors import PolicyError, RingredError, TooFewWorkers
from ringred.parameter_server import messages as m
from ringred.parameter_server.catalog import WHOLE, Catalog, Placing
from ringred.parameter_server.policies import Decision, Gradient, Policy
from ringred.parameter_server.report import Figures
from ringred.parameter_server.saving import Order, Saving
from ringred.parameter_server.shard import Answer, Frame, Result

__all__ = ["Coordinator", "Order", "StalenessAware"]

StalenessAware = Literal["mean", "per_gradient"]
_UNRELEASED = m.Released(0, 0, 0)
_RECENT = 4096  # gradients over which the mean staleness of `staleness_aware="mean"` is taken


@dataclass
class _Worker:
    """A worker: its connection and life, what of it counted, and its last release."""

    peer: bytes
    life: int
    hello: int
    sequence: int = -1
    released: m.Released = _UNRELEASED
    there: bool = True
    done: bool = False


class Coordinator:
    """Handles the messages for the coordinator of `workers` workers and `shards` shards.

    `staleness_aware="mean"` divides the rate by the mean staleness of the last gradients, "per_gradient" each gradient
    by its own; neither makes them larger (Zhang et al., IJCAI 2016). The training is over after `updates` updates, or
    when workers that have left because they were done are too many for the policy. After `every` updates there is a
    snapshot in the folder `snapshots`. Tensors lie as `placing` says.
    """

    def __init__(
        self,
        policy: Policy,
        workers: int,
        shards: int,
        *,
        updates: int | None = None,
        staleness_aware: StalenessAware | None = None,
        snapshots: str | None = None,
        every: int | None = None,
        placing: Placing = WHOLE,
    ) -> None:
        self.policy, self.expected, self.shards, self.updates = policy, workers, shards, updates
        if staleness_aware not in (None, "mean", "per_gradient"):
            raise PolicyError(f"staleness_aware: expected 'mean', 'per_gradient' or None, got {staleness_aware!r}")
        self.staleness_aware = staleness_aware
        self._snapshots, self._every = snapshots, every
        self.saving = Saving(self._order, self.state)
        self._lives = 0  # of the workers that it started with, together
        self.workers: dict[int, _Worker] = {}
        self.figures = Figures()
        self.rate = 1.0
        self.started = self.over = False
        self.failure: RingredError | None = None
        self.orders: list[dict[int, Order]] = [{} for _ in range(shards)]
        self._numbers = [0] * shards
        self.catalog = Catalog(shards, placing)
        self._farewells: list[tuple[bytes, int]] = []
        self._attending: dict[int, bool] = {}  # by life, whether it is still there
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._loaded = -1  # the version of a state that was given

    def handle(self, peer: bytes, request: int, message: Any, frames: Sequence[Frame]) -> list[Result | Order]:
        """What `message` leads to. A wrong message is answered by `Failed` and changes nothing."""
        try:
            if self.failure is not None and isinstance(message, (m.Commit, m.Await)):
                raise self.failure
            return self._HANDLERS[type(message)](self, peer, request, message)
        except Exception as failure:  # whatever a stranger may say, this one goes on
            kind = type(failure).__name__ if isinstance(failure, RingredError) else "PolicyError"
            return [Answer(peer, request, m.Failed(kind, str(failure)))]

    # ------------------------------------------------------------------ workers

    def _hello(self, peer: bytes, request: int, message: m.Hello) -> list[Result | Order]:
        number, life = message.worker, message.life
        if not 0 <= number < self.expected:
            raise PolicyError(f"worker {number} said hello; expected 0 to {self.expected - 1}")
        known = self.workers.get(number)
        if known is not None and known.there and known.life == life:  # said again: the answer was lost, or is to come
            known.peer, known.hello = peer, request
            return [self._welcome(number), self._release_of(number)] if self.started else []
        answers: list[Result | Order] = []
        if known is not None and known.there:
            answers += self.left(number, known.life, "was started again")
        sequence, released = (-1, _UNRELEASED) if known is None else (known.sequence, known.released)
        self.workers[number] = _Worker(peer, life, request, sequence, released)
        if self.started:
            decision = self.policy.joined(number)
            self._revive()
            return [*answers, self._welcome(number), *self._follow(decision), *self._end_of(number)]
        if len(self.workers) < self.expected or not all(worker.there for worker in self.workers.values()):
            return answers
        decision = self.policy.start(self.workers)
        self.started = True
        for worker in self.workers.values():
            self._lives ^= worker.life
        return [*answers, *map(self._welcome, sorted(self.workers)), *self._follow(decision)]

    def _welcome(self, number: int) -> Answer:
        worker = self.workers[number]
        told = {
            "policy": repr(self.policy),
            "workers": self.expected,
            "shards": self.shards,
            "shares": self.catalog.shares,
        }
        return Answer(worker.peer, worker.hello, m.Welcome(json.dumps({**told, "sequence": worker.sequence})))

    def _release_of(self, number: int) -> Answer:
        return Answer(self.workers[number].peer, 0, self.workers[number].released)

    def left(self, number: int, life: int, how: str, *, done: bool = False) -> list[Result | Order]:
        """The `life`-th life of worker `number` ended: it is `done`, or its process or connection is gone."""
        worker = self.workers.get(number)
        if worker is None or worker.life != life or not worker.there:
            return []
        worker.there, worker.done = False, done
        answers = [*self.catalog.left(number), *self._farewell()]
        if not self.started:
            return answers
        try:
            return [*answers, *self._follow(self.policy.left(number))]
        except TooFewWorkers as failure:
            if done or self.over:
                return [*answers, *self._end()]
            self.failure = TooFewWorkers(f"{failure} (worker {number} {how})")
            text = m.Failed("TooFewWorkers", str(self.failure))
            return [*answers, *(Answer(other.peer, 0, text) for other in self.workers.values() if other.there)]

    def lives(self) -> list[tuple[int, int]]:
        """The workers that are there, and their lives."""
        return [(number, worker.life) for number, worker in self.workers.items() if worker.there]

    @property
    def abandoned(self) -> bool:
        """Whether all workers have left."""
        there = [*self._attending.values(), *(worker.there for worker in self.workers.values())]
        return self.started and not any(there)

    @property
    def finished(self) -> bool:
        """Whether all workers have left because they were done."""
        return self.abandoned and all(worker.done for worker in self.workers.values()) and not self.saving

    def _end(self) -> list[Result | Order]:
        """The training is over; all are told, once."""
        self.over = True
        return [answer for number, worker in self.workers.items() if worker.there for answer in self._end_of(number)]

    def _end_of(self, number: int) -> list[Result | Order]:
        worker = self.workers[number]
        if not self.over or worker.released.how == m.OVER:
            return []
        worker.released = m.Released(self.policy.version, worker.released.number + 1, m.OVER)
        return [self._release_of(number)]

    def _revive(self) -> None:
        if len(self.policy.workers) >= self.policy.fewest:
            self.failure = None

    def _left(self, peer: bytes, request: int, message: m.Left) -> list[Result | Order]:
        self._attending |= {message.life: False} if message.life in self._attending else {}
        return [*self.left(message.worker, message.life, message.how), *self._farewell()]

    def _bye(self, peer: bytes, request: int, message: m.Bye) -> list[Result | Order]:
        if (peer, request) not in self._farewells and message.last:
            self._farewells.append((peer, request))
        how = f"raised {message.because}" if message.because else "left"
        self._attending |= {message.life: False} if message.life in self._attending else {}
        answers = [*self.left(message.worker, message.life, how, done=not message.because), *self._farewell()]
        return answers if message.last else [*answers, Answer(peer, request, m.Done())]

    def _attend(self, peer: bytes, request: int, message: m.Attend) -> list[Result | Order]:
        if (peer, request) not in self._farewells:
            self._farewells.append((peer, request))
        self._attending.setdefault(message.life, True)  # False: it is only asked again
        return self._farewell()

    def _farewell(self) -> list[Result | Order]:
        """Answers those who wait for the last worker to leave, if it has."""
        if self.saving or any(self._attending.values()) or any(worker.there for worker in self.workers.values()):
            return []
        told, self._farewells = self._farewells, []
        return [Answer(peer, request, m.Done()) for peer, request in told]

    # ------------------------------------------------------------------ gradients

    def _commit(self, peer: bytes, request: int, message: m.Commit) -> list[Result | Order]:
        worker = self._living(message.worker, message.life)
        worker.peer = peer
        committed = Answer(peer, request, m.Committed(message.sequence))
        if message.sequence <= worker.sequence:  # said again
            return [committed]
        if self.over:
            worker.sequence = message.sequence
            self.figures.dropped += 1
            return [committed, *self._order(m.Discard((Gradient(message.worker, message.sequence, message.version),)))]
        gradient = Gradient(message.worker, message.sequence, message.version)
        decision = self.policy.pushed(gradient)  # raises before it changes anything
        worker.sequence = message.sequence
        return [committed, *self._follow(decision)]

    def _await(self, peer: bytes, request: int, message: m.Await) -> list[Result | Order]:
        worker = self._living(message.worker, message.life)
        worker.peer = peer
        return [self._release_of(message.worker)] if worker.released.number > message.number else []

    def _living(self, number: int, life: int) -> _Worker:
        worker = self.workers.get(number)
        if worker is None or worker.life != life or not worker.there:
            raise PolicyError(f"worker {number} is not known in its life {life:x}; it has to say hello first")
        return worker

    def _follow(self, decision: Decision) -> list[Result | Order]:
        answers: list[Result | Order] = []
        if decision.apply:
            stale = [self.policy.version - 1 - gradient.version for gradient in decision.apply]
            self.figures.staleness.update(stale)
            self.figures.applied.update(gradient.worker for gradient in decision.apply)
            self._recent.extend(stale)
            weights = tuple(self._weight(staleness) for staleness in stale)
            apply = m.Apply(self.policy.version, self.rate * self._mean_rate(), decision.apply, weights, decision.drop)
            answers += self._order(apply)
        elif decision.drop:
            answers += self._order(m.Discard(decision.drop))
        if decision.apply and self._snapshots is not None and self._every and self.policy.version % self._every == 0:
            answers += self.saving.begin(self._snapshots, self._token(), [])
        self.figures.dropped += len(decision.drop)
        self.figures.cancelled += len(decision.cancel)
        cancelled = set(decision.cancel)
        if self.updates is not None and self.policy.version >= self.updates:
            return [*answers, *self._end()]
        for number in decision.release:
            worker = self.workers[number]
            how = m.CANCELLED if number in cancelled else m.PLAIN
            worker.released = m.Released(self.policy.version, worker.released.number + 1, how)
            answers.append(self._release_of(number))
        return answers

    def _weight(self, staleness: int) -> float:
        return 1.0 / max(1, staleness) if self.staleness_aware == "per_gradient" else 1.0

    def _mean_rate(self) -> float:
        if self.staleness_aware != "mean":
            return 1.0
        return 1.0 / max(1.0, sum(self._recent) / len(self._recent))

    # ------------------------------------------------------------------ orders to shards

    def _order(self, message: Any, only: Iterable[int] | None = None) -> list[Order]:
        made: list[Order] = []
        for shard in range(self.shards) if only is None else only:
            self._numbers[shard] += 1
            order = Order(shard, self._numbers[shard], message)
            self.orders[shard][order.number] = order
            made.append(order)
        return made

    def answered(self, shard: int, number: int, failure: str = "") -> list[Result | Order]:
        """Shard `shard` has done what its `number`-th order says, or could not."""
        self.orders[shard].pop(number, None)
        results = self.saving.answered(shard, number, failure)
        return [*results, *self._farewell()] if results else []

    @property
    def first_open(self) -> tuple[int, ...]:
        """For each shard the number of the first order that is not answered."""
        return tuple(min(orders, default=last + 1) for orders, last in zip(self.orders, self._numbers, strict=True))

    def forget_before(self, numbers: Sequence[int]) -> None:
        """For each shard, the orders before that number are answered."""
        for orders, first in zip(self.orders, numbers, strict=True):
            for number in [number for number in orders if number < first]:
                del orders[number]
        self.saving.forget_before(numbers)

    def taken_over(self) -> list[Result | Order]:
        """What has to be said again by the server that takes the place of one that may not have said it: the workers'
        last releases, and the open orders."""
        releases = [self._release_of(number) for number, worker in self.workers.items() if worker.released.number]
        return [*releases, *(order for orders in self.orders for order in orders.values())]

    # ------------------------------------------------------------------ tensors

    def _declare(self, *asked: Any) -> list[Result | Order]:
        return [*self.catalog.declare(*asked)]

    def _created(self, *asked: Any) -> list[Result | Order]:
        return [*self.catalog.created(*asked)]

    # ------------------------------------------------------------------ all that there is

    def _token(self) -> str:
        """Unlike that of another job, and of another snapshot of this one."""
        return f"{self._lives:014x}-{self._numbers[0]}"

    def written(self, snapshot: str, failure: str) -> list[Result | Order]:
        """The coordinator's own part of a snapshot is on disk, or could not be written."""
        return [*self.saving.written(snapshot, failure), *self._farewell()]

    def _save(self, peer: bytes, request: int, message: m.Save) -> list[Result | Order]:
        return self.saving.begin(message.folder, self._token(), [(peer, request)])

    def _collect(self, peer: bytes, request: int, message: m.Collect) -> list[Result | Order]:
        if len(message.requests) != self.shards:
            raise PolicyError(f"{len(message.requests)} requests for {self.shards} shards")
        shows = [m.Show(self.policy.version, peer.decode(), number) for number in message.requests]
        orders = [order for shard, show in enumerate(shows) for order in self._order(show, [shard])]
        return [Answer(peer, request, m.State(json.dumps(self.state()))), *orders]

    def state(self) -> dict[str, Any]:
        """What `whole.joined` takes of the coordinator."""
        told = {"version": self.policy.version, "rate": self.rate, "policy": repr(self.policy), "shards": self.shards}
        return {**told, "figures": self.figures.told(), **self.catalog.state()}

    def load_state(self, told: Mapping[str, Any]) -> None:
        """Goes on from a state. Raises `PolicyError` once there were updates."""
        if self.policy.version > 0:
            raise PolicyError(
                f"the state of version {told['version']} comes too late: there were {self.policy.version} updates; "
                "every worker gives it before its first pull"
            )
        figures, version, rate = Figures.of(told["figures"]), int(told["version"]), float(told["rate"])
        self.catalog.load_state(told)
        self.figures, self.rate = figures, rate
        self.policy.version = self._loaded = version

    def _take(self, peer: bytes, request: int, message: m.State) -> list[Result | Order]:
        """Each worker may give the same state; the first one counts. Whatever was computed before is of no use."""
        told = json.loads(message.text)
        if self._loaded == told["version"]:
            return [Answer(peer, request, m.Done())]
        self.load_state(told)
        answers: list[Result | Order] = [Answer(peer, request, m.Done())]
        if self.updates is not None and self.policy.version >= self.updates:
            return [*answers, *self._end()]
        for number in sorted(self.policy.workers):
            worker = self.workers[number]
            worker.released = m.Released(self.policy.version, worker.released.number + 1, m.CANCELLED)
            answers.append(self._release_of(number))
        return answers

    # ------------------------------------------------------------------ figures

    def _report(self, peer: bytes, request: int, message: m.Report) -> list[Result | Order]:
        return [Answer(peer, request, m.Told(json.dumps(self.report())))]

    def report(self) -> dict[str, Any]:
        """Updates, gradients and staleness so far; see `report.Report`."""
        return {
            "policy": repr(self.policy),
            "updates": self.policy.version,
            "workers": sorted(number for number, worker in self.workers.items() if worker.there),
            **self.figures.told(),
            "snapshot": self.saving.newest,
            "snapshot_failure": self.saving.failure,
            "rate": self.rate * self._mean_rate() if self._recent else self.rate,
        }

    def _scale(self, peer: bytes, request: int, message: m.Scale) -> list[Result | Order]:
        self.rate = message.rate
        return [Answer(peer, request, m.Done())]

    _HANDLERS: ClassVar[dict[type[Any], Callable[..., list[Result | Order]]]] = {
        m.Hello: _hello,
        m.Left: _left,
        m.Bye: _bye,
        m.Attend: _attend,
        m.Commit: _commit,
        m.Await: _await,
        m.Declare: _declare,
        m.Created: _created,
        m.Save: _save,
        m.Collect: _collect,
        m.State: _take,
        m.Report: _report,
        m.Scale: _scale,
    }
