"""Collectives in flight, as torch knows them."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch.distributed as _distributed
from torch import Tensor

from ringred.runtime.compiling import never_compiled
from ringred.runtime.futures import future_of
from ringred.runtime.work import Work

dist: Any = _distributed  # torch declares no types for most of what is used here

__all__ = ["RingredWork"]


@never_compiled
class RingredWork(dist.Work):  # type: ignore[misc]
    """One or more collectives in flight, as a torch `Work`. Its future holds `outputs`."""

    def __init__(self, works: list[Work[None]], outputs: list[Tensor]) -> None:
        super().__init__()
        self._works, self._outputs = works, outputs
        self._future: Any = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until all is done; for tensors of a CUDA device, until what the current stream does next comes after
        it. Raises what the communicator raises, or `CollectiveTimeout` after `timeout`."""
        seconds = None if timeout is None or timeout.total_seconds() <= 0 else timeout.total_seconds()
        deadline = None if seconds is None else time.monotonic() + seconds
        for work in self._works:
            work.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return True

    def get_future(self) -> Any:
        """A `torch.futures.Future` of the outputs, which fails with the communicator's exception."""
        if self._future is None:
            self._future = future_of(self._works, self.result, {tensor.device for tensor in self._outputs})
        return self._future

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        return next((error for error in (work.exception() for work in self._works) if error is not None), None)

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return self._outputs

    def source_rank(self) -> int:
        raise RuntimeError("source_rank: only a receive from any rank has a source")
