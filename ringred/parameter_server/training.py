"""`ParameterServer`: trains a model whose parameters live on servers, under any policy, around an ordinary loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ringred.communicator import Communicator, default_communicator
from ringred.errors import PolicyError, RingredError, UnsupportedTensor
from ringred.parameter_server.coordinator import StalenessAware
from ringred.parameter_server.encoding import encoding_of
from ringred.parameter_server.hosting import Hosted, in_ranks
from ringred.parameter_server.keys import Keys
from ringred.parameter_server.policies import Async, Policy
from ringred.parameter_server.report import Report
from ringred.parameter_server.rules import MakeOptimizer, MakeSchedule, rule_of
from ringred.parameter_server.serving import find_servers
from ringred.parameter_server.worker import Gradients, Worker
from ringred.runtime import lifetime

__all__ = ["ParameterServer"]

_PART_BYTES = 1 << 20  # gradients are sent when as many bytes are there


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

    Every rank of `comm` (default: all ranks) is a worker, and the first `shards` of them (default: all) host a shard.
    Or the servers are processes of their own, which have the policy (`ringred serve`): `servers` is the folder where
    they meet, or their addresses with the job's `keys`; `worker` is this worker's number (default: its rank).
    Raises `PolicyError` for a policy that the workers are too few for, and for an optimizer that no server can step.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        optimizer: MakeOptimizer,
        policy: Policy | None = None,
        *,
        shards: int | None = None,
        updates: int | None = None,
        schedule: MakeSchedule | None = None,
        staleness_aware: StalenessAware | None = None,
        compression: str | None = None,
        comm: Communicator | Any = None,
        servers: str | Path | Sequence[str] | None = None,
        keys: Keys | None = None,
        worker: int | None = None,
        encrypt: bool = True,
        shared: bool = True,
        timeout: float | None = None,
    ) -> None:
        self.parameters = _named(model)
        rule, groups = rule_of(optimizer, list(self.parameters.values()), schedule)
        hosted = Hosted([], keys, None)
        if servers is None:
            self.comm = default_communicator(comm)
            worker = self.comm.rank
            timeout = self.comm.config.timeout if timeout is None else timeout
            hosted = in_ranks(
                self.comm,
                policy or Async(),
                self.comm.size if shards is None else shards,
                updates=updates,
                staleness_aware=staleness_aware,
                encrypt=encrypt,
                shared=shared,
            )
        else:
            self._check_served(policy, shards, updates, staleness_aware)
            if isinstance(servers, (str, Path)):
                hosted = Hosted(*find_servers(servers, 60.0 if timeout is None else timeout), None)
            else:
                hosted = Hosted(list(servers), keys, None)
            worker = default_communicator(comm).rank if worker is None else worker
        self._hosted = hosted
        self._worker: Worker | None = None
        try:
            self._worker = Worker(
                worker,
                hosted.addresses,
                keys=hosted.keys,
                timeout=60.0 if timeout is None else timeout,
                shared=shared,
                encoding=encoding_of(compression),
            )
            self._worker.declare(self.parameters, rule, groups)
            self._targets = self._worker.targets(self.parameters)
        except BaseException:
            self.close()
            raise
        self._gradients: Gradients | None = None
        self._ready: dict[str, Tensor] = {}
        self._ready_bytes = 0
        self._pushed: set[str] = set()
        self._synced = True
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in self.parameters.items()
        ]

    def _check_served(self, *given: Any) -> None:
        if any(value is not None for value in given):
            raise PolicyError(
                "policy, shards, updates and staleness_aware are the servers' own: give them to ringred serve"
            )

    # ------------------------------------------------------------------ the loop

    def pull(self, timeout: float | None = None) -> bool:
        """Waits until this worker is released, and takes the newest parameters. Returns False if they are the last.
        Raises `CollectiveTimeout` after `timeout` seconds."""
        worker = self.worker
        self._abandon()
        version = worker.begin(timeout)
        if worker.version < version or worker.never_pulled:
            with torch.no_grad():
                worker.take(self._targets, version, timeout)
        return not worker.over

    def push(self) -> bool:
        """Ends the mini-batch: its gradients count once this returns. False if they were not wanted any more."""
        worker = self.worker
        cancelled = worker.cancelled
        if not cancelled:
            rest = {
                name: parameter.grad
                for name, parameter in self.parameters.items()
                if parameter.grad is not None and name not in self._pushed
            }
            self._ready |= rest
            self._send_ready()
            worker.commit(self._gradients or worker.gradients())
        self._abandon()
        return not cancelled

    @property
    def cancelled(self) -> bool:
        """Whether the mini-batch in progress is not wanted any more: its backward may be left out."""
        return self.worker.cancelled

    def sleep(self, seconds: float) -> bool:
        """Waits as long, or until the mini-batch in progress is cancelled; whether it was not. For experiments with
        stragglers."""
        return self.worker.sleep(seconds)

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
                self._ready[name] = parameter.grad
                self._ready_bytes += parameter.grad.nbytes
                if self._ready_bytes >= _PART_BYTES:
                    self._send_ready()

        return on_gradient

    def _send_ready(self) -> None:
        ready, self._ready, self._ready_bytes = self._ready, {}, 0
        for name, gradient in ready.items():
            if gradient.layout is not torch.strided:
                raise UnsupportedTensor(f"the gradient of {name!r} is sparse; see ringred.parameter_server.Hogwild")
        if self._gradients is None:
            self._gradients = self.worker.gradients()
        self._pushed.update(ready)
        self.worker.push(self._gradients, ready)

    def _abandon(self) -> None:
        """Nothing of a mini-batch is left; what was sent of it and not committed is dropped by the servers."""
        self._gradients = None
        self._ready, self._ready_bytes = {}, 0
        self._pushed.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    # ------------------------------------------------------------------ the rest

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            raise RingredError("this parameter server is closed")
        return self._worker

    @property
    def version(self) -> int:
        """Of the parameters that were pulled last: how many updates had been made."""
        return self.worker.version

    def report(self) -> Report:
        """What the servers have done so far, staleness above all."""
        return Report.of(self.worker.report())

    def scale_rate(self, rate: float) -> None:
        """From the next update on, learning rates are those of the optimizer times `rate`."""
        self.worker.scale_rate(rate)

    def close(self) -> None:
        """Leaves. A rank that hosts a shard waits here until all workers have left. In a `finally` that runs because of
        an exception the others hear of it."""
        failure = lifetime.ending_with()
        because = "" if failure is None else f"{type(failure).__name__}: {failure}"
        for hook in getattr(self, "_hooks", ()):
            hook.remove()
        if self._worker is not None:
            worker, self._worker = self._worker, None
            worker.close(last=self._hosted.server is not None and not because, because=because)
        if self._hosted.server is not None:
            self._hosted.server.close(f"raised {because}" if because else "")
            self._hosted = self._hosted._replace(server=None)

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> None:
        self.close()


def _named(model: nn.Module | Iterable[Any]) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name; shared ones once."""
    given = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    named = [entry if isinstance(entry, tuple) else (f"parameter {at}", entry) for at, entry in enumerate(given)]
    found = {name: parameter for name, parameter in named if parameter.requires_grad}
    if not found:
        raise ValueError("ParameterServer: no parameter requires a gradient")
    return found
