"""`ParameterServer`: trains a model whose parameters live on servers, under any policy, around an ordinary loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ringred.errors import PolicyError
from ringred.parameter_server.by_host import ByHost
from ringred.parameter_server.flat import Flat
from ringred.parameter_server.hosting import Membership, Placement
from ringred.parameter_server.policies import Policy
from ringred.parameter_server.report import Report
from ringred.parameter_server.rules import MakeOptimizer, MakeSchedule, rule_of
from ringred.parameter_server.worker import Worker

__all__ = ["ParameterServer", "named_parameters"]


class ParameterServer:
    """Keeps the parameters of `model` (a module, named parameters, or parameters) on servers, and trains them there.

        ps = ringred.ParameterServer(model, lambda params: torch.optim.SGD(params, lr=0.1), policy=KAsync(3))
        for images, labels in loader:
            if not ps.pull():
                break
            loss(model(images), labels).backward()
            ps.push()
        ps.close()

    `pull` waits until the policy releases this worker, and takes the newest parameters; it returns False once the
    training is over, after `updates` updates or when too many workers have closed. Gradients go out while backward
    makes them; `push` ends the mini-batch and clears them. The servers step `optimizer`, one of torch.optim's, with
    `schedule`, one of its schedules, once for each update.

    The other arguments say where the servers are: see `Placement`. By default every rank is a worker and hosts a shard.
    With `overlap`, `pull` returns before the parameters are there: each layer waits for its own in forward, the front
    layers' come first, and who reads a parameter outside of its layer calls `arrive` before.
    `compression` is "half", "bfloat16", "int8" or "top_k:0.01": how gradients are sent (`encoding`).
    Raises `PolicyError` for a policy that the workers are too few for, and for an optimizer that no server can step.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        optimizer: MakeOptimizer,
        policy: Policy | None = None,
        *,
        schedule: MakeSchedule | None = None,
        compression: str | None = None,
        overlap: bool = False,
        **placement: Any,
    ) -> None:
        self.parameters = named_parameters(model)
        if overlap and not isinstance(model, nn.Module):
            raise TypeError(
                f"overlap needs a module, whose layers wait for their parameters; got {type(model).__name__}"
            )
        if overlap and placement.get("hierarchy", "flat") != "flat":
            raise PolicyError("overlap is for hierarchy='flat': the ranks of a host gather all layers at once")
        layers = model if overlap and isinstance(model, nn.Module) else None
        rule, groups = rule_of(optimizer, list(self.parameters.values()), schedule)
        nbytes = sum(parameter.nbytes for parameter in self.parameters.values())
        self._member = Membership(Placement(policy, **placement), compression, nbytes)
        try:
            self._member.in_turn(lambda: self.worker.declare(self.parameters, rule, groups))
            local = self._member.local
            self._way: Flat | ByHost
            if local is None:
                self._way = Flat(self.worker, self.parameters, layers)
            else:
                self._way = ByHost(self.worker, self.parameters, local)
        except BaseException:
            self._member.close()
            raise
        self._synced = True
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in self.parameters.items()
        ]

    # ------------------------------------------------------------------ the loop

    def pull(self, timeout: float | None = None) -> bool:
        """Waits until this worker is released, and takes the newest parameters. Returns False if they are the last.
        Raises `CollectiveTimeout` after `timeout` seconds."""
        self._clear()
        with self._member.recorded("pull"):
            return self._way.pull(timeout)

    def arrive(self) -> None:
        """Waits for all parameters of the last `pull`, which with `overlap` may still be on their way."""
        self._way.arrive()

    def push(self) -> bool:
        """Ends the mini-batch: its gradients count once this returns. False if they were not wanted any more."""
        with self._member.recorded("push"):
            wanted = self._way.push()
        self._clear()
        return wanted

    @property
    def cancelled(self) -> bool:
        """Whether the mini-batch in progress is not wanted any more: its backward may be left out."""
        return self._way.cancelled

    def sleep(self, seconds: float) -> bool:
        """Waits as long, or until the mini-batch in progress is cancelled; whether it was not. For experiments with
        stragglers."""
        return self.worker.releases.sleep(seconds)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backwards within it are kept, and added to those of the next one outside."""
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before

    def _hook(self, name: str) -> Any:
        def on_gradient(parameter: Tensor) -> None:
            if self._synced and parameter.grad is not None:
                self._way.ready(name, parameter.grad)

        return on_gradient

    def _clear(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    # ------------------------------------------------------------------ the rest

    @property
    def worker(self) -> Worker:
        """This worker's side of the protocol. Raises `RingredError` once this is closed."""
        return self._member.worker

    @property
    def over(self) -> bool:
        """Whether the last `pull` took what the training came to."""
        return self.worker.releases.over

    @property
    def version(self) -> int:
        """Of the parameters that were pulled last: how many updates had been made."""
        return self.worker.version

    def report(self) -> Report:
        """What the servers have done so far, staleness above all."""
        return Report.of(self.worker.report())

    def state_dict(self) -> dict[str, Any]:
        """All that the servers have, at one version: values, what the optimizers keep, figures. See `whole`. Any worker
        may ask, at any time."""
        return self.worker.collect()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The servers go on from a state, whatever their number was and is. Every worker calls it before its first
        `pull`; the options of the optimizer are those of the state. Raises `PolicyError` for a state of other tensors,
        and once there were updates."""
        self.worker.give(state)

    def save(self, folder: str | Path) -> int:
        """A snapshot of now, in a folder that all servers see; returns its version. `parameter_server.read_snapshot`
        reads it."""
        return self.worker.save(str(Path(folder).absolute()))

    def scale_rate(self, rate: float) -> None:
        """From the next update on, learning rates are those of the optimizer times `rate`."""
        self.worker.scale_rate(rate)

    def close(self) -> None:
        """Leaves. A rank that hosts a shard waits here until all workers have left. In a `finally` that runs because of
        an exception the others hear of it."""
        for hook in self._hooks:
            hook.remove()
        try:
            self._way.close()
        finally:
            self._member.close()

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> None:
        self.close()


def named_parameters(model: nn.Module | Iterable[Any]) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name; shared ones once."""
    given = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    named = [entry if isinstance(entry, tuple) else (f"parameter {at}", entry) for at, entry in enumerate(given)]
    found = {name: parameter for name, parameter in named if parameter.requires_grad}
    if not found:
        raise ValueError("ParameterServer: no parameter requires a gradient")
    return found
