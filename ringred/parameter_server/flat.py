"""Every worker pushes and pulls all of the parameters by itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ringred.errors import UnsupportedTensor
from ringred.parameter_server.arriving import Arriving
from ringred.parameter_server.worker import Gradients, Worker

__all__ = ["Flat", "check_dense"]

_PART_BYTES = 1 << 20  # gradients are sent when as many bytes are there


class Flat:
    """Pulls `parameters` and pushes their gradients; with `layers`, each layer waits for its own in forward."""

    def __init__(self, worker: Worker, parameters: Mapping[str, nn.Parameter], layers: nn.Module | None) -> None:
        self._worker, self._parameters = worker, parameters
        self._arriving = Arriving(worker, parameters, layers)
        self._gradients: Gradients | None = None
        self._ready: dict[str, Tensor] = {}
        self._ready_bytes = 0
        self._pushed: set[str] = set()

    def pull(self, timeout: float | None) -> bool:
        """Waits until this worker is released, and takes the newest parameters; whether they are not the last."""
        worker = self._worker
        self._arriving.finish()
        self._abandon()
        version = worker.begin(timeout)
        if worker.releases.pulled < version:
            self._arriving.start(version, timeout)
            if worker.releases.over:
                self._arriving.finish()
        return not worker.releases.over

    def arrive(self) -> None:
        """Waits for all that the last `pull` asked for."""
        self._arriving.finish()

    def ready(self, name: str, gradient: Tensor) -> None:
        """Backward has made this gradient."""
        self._ready[name] = gradient
        self._ready_bytes += gradient.nbytes
        if self._ready_bytes >= _PART_BYTES:
            self._send_ready()

    def push(self) -> bool:
        """Ends the mini-batch; whether it was still wanted."""
        worker = self._worker
        cancelled = worker.releases.cancelled
        if not cancelled:
            for name, parameter in self._parameters.items():
                if parameter.grad is not None and name not in self._pushed:
                    self._ready[name] = parameter.grad
            self._send_ready()
            worker.commit(self._gradients or worker.gradients())
        self._abandon()
        return not cancelled

    @property
    def cancelled(self) -> bool:
        """Whether the mini-batch in progress is not wanted any more."""
        return self._worker.releases.cancelled

    def _send_ready(self) -> None:
        self._arriving.finish()  # of layers that forward did not come to
        ready, self._ready, self._ready_bytes = self._ready, {}, 0
        check_dense(ready)
        if self._gradients is None:
            self._gradients = self._worker.gradients()
        self._pushed.update(ready)
        self._worker.push(self._gradients, ready)

    def _abandon(self) -> None:
        """Nothing of a mini-batch is left; what was sent of it and not committed is dropped by the servers."""
        self._gradients = None
        self._ready, self._ready_bytes = {}, 0
        self._pushed.clear()

    def close(self) -> None:
        """Layers do not wait any more."""
        self._arriving.close()


def check_dense(gradients: Mapping[str, Tensor]) -> None:
    """Raises `UnsupportedTensor` for a sparse gradient."""
    for name, gradient in gradients.items():
        if gradient.layout is not torch.strided:
            raise UnsupportedTensor(f"the gradient of {name!r} is sparse; see ringred.parameter_server.Hogwild")
