"""Means over uneven batches: each rank's gradient counts by the number of its samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ringred.communicator import Communicator
from ringred.data_parallel.sync_batchnorm import SyncBatchNorm

__all__ = ["Weights"]


class Weights:
    """The samples behind the gradients of the next synchronised forward, on the ranks of `comm`."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self._samples: float | None = None
        self._last = 0.0

    @property
    def given(self) -> bool:
        """Whether they are known for the next forward."""
        return self._samples is not None

    def give(self, samples: float, module: nn.Module) -> None:
        """This rank has `samples` samples. Raises `ValueError` for a number or a `module` that weights do not fit."""
        if any(isinstance(part, (SyncBatchNorm, nn.SyncBatchNorm)) for part in module.modules()):
            raise ValueError(
                "weigh does not go with SyncBatchNorm, which adds gradients of all ranks before they are weighed: use "
                "reduce_op='sum', and divide losses by the samples of all ranks"
            )
        if not 0 <= samples < float("inf"):
            raise ValueError(f"weigh: expected a number of samples ≥ 0, got {samples}")
        self._samples = float(samples)

    def gathered(self) -> Callable[[], float]:
        """Starts to add up the samples of all ranks; the result returns this rank's part of them. Collective. Called
        again, it does so for what was given last."""
        if self._samples is not None:
            self._last, self._samples = self._samples, None
        mine = self._last
        total = torch.tensor([mine], dtype=torch.float64)
        work = self.comm.all_reduce(total, async_op=True)
        known: list[float] = []

        def scale() -> float:
            if not known:
                work.wait()
                if not total.item():
                    raise ValueError(f"rank {self.comm.rank}: weigh: all ranks together have no samples")
                known.append(mine / total.item())
            return known[0]

        return scale
