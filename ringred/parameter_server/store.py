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
from ringred.parameter_server.report import Report
from ringred.parameter_server.rules import MakeOptimizer, Rule, rule_of
from ringred.parameter_server.worker import Gradients, Worker

__all__ = ["Handle", "Store"]

Keys = str | Sequence[str]
Values = Tensor | Sequence[Tensor]


class Handle:
    """A push or a pull that has begun. `wait` ends it; so does the store's next call."""

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
        self._make = rule
        self._rule: Rule | None = None
        self._shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._clock = 0
        self._pushed = False
        self._open: Handle | None = None
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
        if self._pushed or worker.releases.never:  # a pull has not asked for the release that each push needs
            self._clock = max(self._clock, worker.begin())
        gradients = worker.gradients()
        worker.push(gradients, given)
        self._pushed = True
        handle = Handle(lambda timeout: self._commit(gradients, self._clock if clock is None else clock))
        self._open = handle
        if not async_op:
            handle.wait()
        return handle

    def _commit(self, gradients: Gradients, clock: int) -> int:
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
    ) -> Any:
        """Copies the values to `out`, the first keys first, and returns their clock; with `async_op` a handle.

        Waits for values of `min_clock` or newer; by default, after a push, for the policy to release this worker.
        """
        given = self._checked("pull", keys, out)
        self._finish()
        worker = self.worker
        targets = worker.targets(given)

        def finish(limit: float | None) -> int:
            least = min_clock
            if least is None:
                least = worker.begin(limit) if self._pushed or worker.releases.never else self._clock
                self._pushed = False
            self._clock = worker.pull(targets, least, limit)
            return self._clock

        handle = Handle(finish)
        if async_op:
            self._open = handle
            return handle
        return handle.wait(timeout)

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
        if self._open is not None:
            handle, self._open = self._open, None
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
