"""A stream of a device as the executor sees it: where it puts what is to be done, one thing after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ringred.transports.cuda.driver import Driver, Event, Kernel

__all__ = ["StreamQueue"]


class StreamQueue:
    """A new stream of the device of `driver`. See `base.Queue`."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.stream = driver.stream()

    def here(self) -> Event | None:
        """As `base.Queue.here`."""
        return self.stream.here()

    def following(self, point: Event | None) -> AbstractContextManager[None]:
        """As `base.Queue.following`."""
        return self.stream.following(point)

    def record(self) -> Event:
        """As `base.Queue.record`."""
        return self.stream.record()

    def precede(self, point: Event) -> bool:
        """As `base.Queue.precede`."""
        return self.stream.precede(point)

    def share(self, tensor: Tensor, point: Event | None) -> None:
        """As `base.Queue.share`."""
        if point is not None:
            self.stream.share(tensor, point)

    def over(self, address: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """As `base.Queue.over`."""
        return self.driver.tensor(address, nbytes, dtype, None)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """As `base.Queue.copy`."""
        if source.nbytes:
            self.stream.copy(target.data_ptr(), source.data_ptr(), source.nbytes)

    def fold(
        self, kernel: Kernel, out: Tensor, operands: Sequence[Tensor], final: bool, peers: Sequence[int] = ()
    ) -> None:
        """As `base.Queue.fold`."""
        self.stream.fold(kernel, out, operands, final)
