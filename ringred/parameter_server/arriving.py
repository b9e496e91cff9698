"""Parameters that arrive while forward goes on: the front layers' come first, and each layer waits for its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ringred.parameter_server.pulling import Pull
from ringred.parameter_server.worker import Worker

__all__ = ["Arriving"]

_GROUP_BYTES = 1 << 20


class Arriving:
    """Pulls `parameters`, in their order.

    With `layers`, a module whose layers wait for their own parameters in forward, `start` returns at once; else all of
    them are one group, which `start` waits for.
    """

    def __init__(self, worker: Worker, parameters: Mapping[str, nn.Parameter], layers: nn.Module | None) -> None:
        self._worker = worker
        groups: list[dict[str, Tensor]] = [{}]
        self._group_of: dict[int, int] = {}
        nbytes = 0
        for name, parameter in parameters.items():
            if layers is not None and nbytes >= _GROUP_BYTES:
                groups.append({})
                nbytes = 0
            groups[-1][name] = parameter
            nbytes += parameter.nbytes
            self._group_of[id(parameter)] = len(groups) - 1
        self._targets = [worker.targets(group) for group in groups]
        self._pulls: dict[int, Pull] = {}
        self._versions: list[int] = []
        self._timeout = worker.connection.timeout
        self._layered = layers is not None
        self._hooks: list[RemovableHandle] = []
        for module in () if layers is None else layers.modules():
            needed = {self._group_of[id(own)] for own in module.parameters(recurse=False) if id(own) in self._group_of}
            if needed:
                self._hooks.append(module.register_forward_pre_hook(self._waiting_for(sorted(needed))))

    def _waiting_for(self, needed: list[int]) -> Any:
        def before_forward(module: nn.Module, inputs: Any) -> None:
            for group in needed:
                if group in self._pulls:
                    self._finish(group)

        return before_forward

    def start(self, version: int, timeout: float | None) -> None:
        """Asks for values of `version` or newer."""
        self._timeout = self._worker.connection.timeout if timeout is None else timeout
        self._versions = []
        self._pulls = {group: self._worker.start(targets, version) for group, targets in enumerate(self._targets)}
        if not self._layered:
            self.finish()

    def _finish(self, group: int) -> None:
        self._versions.append(self._pulls.pop(group).finish(self._timeout))
        if not self._pulls:
            self._worker.at(min(self._versions))

    def finish(self) -> None:
        """Waits for all of them; then gradients are computed at the oldest version among them."""
        for group in list(self._pulls):
            self._finish(group)

    def close(self) -> None:
        """Layers do not wait any more."""
        for hook in self._hooks:
            hook.remove()
