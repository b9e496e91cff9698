"""`Store`: keys and values on servers, pushed to and pulled from by all workers, under any policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ringred.errors import PolicyError, UnsupportedTensor
from ringred.parameter_server.hosting import Membership, Placement
from ringred.parameter_server.policies import Policy
from ringred.parameter_server.pulling import Pull, Targets
from ringred.parameter_server.report import Report
from ringred.parameter_server.rules import MakeOptimizer, Rule, rule_of
from ringred.parameter_server.worker import Gradients, Worker

__all__ = ["Handle", "Store"]

Keys = str | Sequence[str]
Values = Tensor | Sequence[Tensor]


_WINDOW = 32 << 20  # bytes of pulls that are on their way at once; then those with the highest priority come first


class Handle:
    """A push or a pull that has begun. `wait` ends it; so does the store's next push."""

    def __init__(self, finish: Any) -> None:
        self._finish = finish
        self._result: Any = None

    def wait(self, timeout: float | None = None) -> Any:
        """Of a push the version that it was computed at, of a pull the version that came. Raises `CollectiveTimeout`
        after `timeout` seconds."""
        if self._finish is not None:
            finish, self._finish = self._finish, None  # a failure is raised once
            self._result = finish(timeout)
        return self._result


class _Pulling:
    """A pull that was asked for; `started` once it is on its way."""

    def __init__(self, order: tuple[int, int], targets: Targets, least: int | None) -> None:
        self.order, self.targets, self.least = order, targets, least
        self.started: Pull | None = None


class Store:
    """Values by key, on servers that change them by what is pushed.

        store = ringred.parameter_server.Store("add")
        store.init("weight", torch.zeros(1000))
        store.push("weight", gradient)
        weight = torch.empty(1000)
        clock = store.pull("weight", weight)

    `rule` says what a push does: "add" adds the mean of what the policy takes together, "assign" takes it as the value,
    and a function that makes one of torch.optim's optimizers steps that with it as the gradient. `placement` says where
    the servers are, as in `Placement`; the policy is `Async` by default. A clock is the number of updates made.
    """

    def __init__(self, rule: str | MakeOptimizer = "add", policy: Policy | None = None, **placement: Any) -> None:
        if placement.get("hierarchy", "flat") != "flat":
            raise PolicyError("a store is flat: what the ranks of a host push is not one gradient")
        self._make = rule
        self._rule: Rule | None = None
        self._shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._clock = 0
        self._pulled: list[int] = []  # the clocks of what was pulled since the last push
        self._pushed = False
        self._push: Handle | None = None
        self._pulls: dict[_Pulling, Handle] = {}
        self._member = Membership(Placement(policy, **placement))

    def init(self, key: str | Mapping[str, Tensor], value: Tensor | None = None) -> None:
        """The servers have `key` from here on. The first worker's value counts; each other's must be the same. Raises
        `PolicyError` if it is not, or has another shape or dtype."""
        given = {key: value} if isinstance(key, str) else dict(key)
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor):
                raise UnsupportedTensor(
                    f"worker {self.worker.number}: init of {name!r}: expected a tensor, got {tensor!r}"
                )
        tensors = {name: tensor.detach() for name, tensor in given.items() if tensor is not None}
        self._finish()
        rule, groups = rule_of(self._make, [nn.Parameter(t, requires_grad=False) for t in tensors.values()], None)
        self._rule = self._rule or rule
        self.worker.declare(tensors, self._rule, groups, check_values=True)
        self._shapes |= {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    def push(self, keys: Keys, values: Values, *, clock: int | None = None, async_op: bool = False) -> Handle:
        """Gives `values`, which count as one gradient, computed at the values of `clock` (default: of the last pull,
        or those that were newest when the policy released this worker for this push).

        It counts once this returns, or with `async_op` once the handle is waited for; until then they must not change.
        """
        given = self._checked("push", keys, values)
        self._finish()
        worker = self.worker
        if self._unreleased:  # a pull has not asked for the release that each push needs
            self._clock = max(self._clock, worker.begin())
        at = min(self._pulled, default=self._clock) if clock is None else clock
        self._pulled = []
        gradients = worker.gradients()
        worker.push(gradients, given)
        self._pushed = True
        handle = Handle(lambda timeout: self._commit(gradients, at))
        self._push = handle
        if not async_op:
            handle.wait()
        return handle

    def _commit(self, gradients: Gradients, clock: int) -> int:
        self._push = None
        try:
            self.worker.commit(gradients, clock)
        except PolicyError:
            self._pushed = False  # it does not count, and nothing is released for it
            raise
        return clock

    def pull(
        self,
        keys: Keys,
        out: Values,
        *,
        min_clock: int | None = None,
        timeout: float | None = None,
        async_op: bool = False,
        priority: int = 0,
    ) -> Any:
        """Copies the values to `out`, the first keys first, and returns their clock; with `async_op` a handle.

        Waits for values of `min_clock` or newer; by default, after a push, for the policy to release this worker. Of
        several that were asked for and do not fit on the way together, those with the highest `priority` come first.
        """
        given = self._checked("pull", keys, out)
        if self._push is not None:
            self._push.wait()
        pulling = _Pulling((-priority, len(self._pulls)), self.worker.targets(given), min_clock)
        handle = self._pulls[pulling] = Handle(lambda limit: self._take(pulling, limit))
        if not async_op:
            return handle.wait(timeout)
        self._start_some()
        return handle

    @property
    def _unreleased(self) -> bool:
        """Whether the policy has to release this worker before it goes on."""
        return self._pushed or self.worker.releases.never

    def _start_some(self) -> None:
        """Starts what is due, the highest priority first, as far as it fits on the way together."""
        on_their_way = sum(pulling.targets.nbytes for pulling in self._pulls if pulling.started is not None)
        for pulling in sorted((one for one in self._pulls if one.started is None), key=lambda one: one.order):
            if on_their_way and on_their_way + pulling.targets.nbytes > _WINDOW:
                return
            if pulling.least is None and self._unreleased:
                if not self.worker.releases.is_there():
                    continue
                self._release(None)
            self._start(pulling)
            on_their_way += pulling.targets.nbytes

    def _release(self, limit: float | None) -> None:
        self._clock = max(self._clock, self.worker.begin(limit))
        self._pushed = False

    def _start(self, pulling: _Pulling) -> Pull:
        least = self._clock if pulling.least is None else pulling.least
        pulling.started = self.worker.start(pulling.targets, least)
        return pulling.started

    def _take(self, pulling: _Pulling, limit: float | None) -> int:
        del self._pulls[pulling]
        if pulling.started is None and pulling.least is None and self._unreleased:
            self._release(limit)
        started = pulling.started or self._start(pulling)
        clock = started.finish(self.worker.connection.timeout if limit is None else limit)
        self._pulled.append(clock)
        self._clock = max(self._clock, clock)
        self._start_some()
        return clock

    def _checked(self, what: str, keys: Keys, values: Values) -> dict[str, Tensor]:
        names = [keys] if isinstance(keys, str) else list(keys)
        tensors = [values] if isinstance(values, Tensor) else list(values)
        who = f"worker {self.worker.number}: {what}"
        if len(names) != len(tensors):
            raise PolicyError(f"{who}: {len(names)} keys and {len(tensors)} tensors")
        for name, tensor in zip(names, tensors, strict=True):
            if name not in self._shapes:
                known = ", ".join(map(repr, list(self._shapes)[:8])) or "none"
                raise PolicyError(f"{who}: unknown key {name!r}; there are {known}")
            shape, dtype = self._shapes[name]
            if tensor.shape != shape or tensor.dtype != dtype:
                raise UnsupportedTensor(
                    f"{who} {name!r}: expected {tuple(shape)} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
                )
        return dict(zip(names, tensors, strict=True))

    def _finish(self) -> None:
        """What began before ends before."""
        if self._push is not None:
            self._push.wait()
        for handle in list(self._pulls.values()):
            handle.wait()

    @property
    def worker(self) -> Worker:
        """This worker's side of the protocol. Raises `RingredError` once this is closed."""
        return self._member.worker

    def report(self) -> Report:
        """What the servers have done so far."""
        return Report.of(self.worker.report())

    def state_dict(self) -> dict[str, Any]:
        """All that the servers have, at one clock; see `whole`."""
        self._finish()
        return self.worker.collect()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The servers go on from a state of the same keys. Every worker calls it after its `init`, before it pushes."""
        self._finish()
        self.worker.give(state)

    def save(self, folder: str | Path) -> int:
        """A snapshot of now, in a folder that all servers see; returns its clock."""
        self._finish()
        return self.worker.save(str(Path(folder).absolute()))

    def close(self) -> None:
        """Leaves. A rank that hosts a shard waits here until all workers have left."""
        self._member.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> None:
        if value is None:
            self._finish()
        self.close()
