"""What ringred asks of a device: memory that other processes can open, and streams that work in order.

Addresses are those of this process. Nothing here waits for a stream but `Event.done`, which only looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["HANDLE_BYTES", "Driver", "Event", "Kernel", "MemberGone", "Stream"]

HANDLE_BYTES = 80
"""The greatest length of a handle: `cudaIpcMemHandle_t` has 64 bytes."""


class MemberGone(Exception):
    """Memory could not be opened, because who exposed it has ended."""


class Kernel(Protocol):
    """A fold, as `runtime.folds.Folder` describes it; calling it does it at once, where the host can."""

    op: Any
    """One of `ReduceOp`."""
    dtype: torch.dtype

    def divisor(self, final: bool) -> int:
        """What a fold divides by; 0 if it does not."""

    def __call__(self, out: Tensor, operands: Sequence[Tensor], final: bool) -> None: ...


class Event(Protocol):
    """A point of a stream."""

    def done(self) -> bool:
        """Whether the stream has passed it. Raises `RuntimeError` if the device failed."""

    def seconds_since(self, earlier: Any) -> float:
        """The device's time from an earlier event to this one; both are done."""


class Stream(Protocol):
    """Does one thing after the other, in the order of these calls, which return before it is done."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copies between addresses of the device, of this process or opened, or of this process's own memory."""

    def fold(
        self, kernel: Kernel, out: Tensor, operands: Sequence[Tensor], final: bool, also: Sequence[int] = ()
    ) -> None:
        """Folds `operands` into `out`, and to the addresses `also`: each element is written after it was read."""

    def set_flag(self, address: int, value: int) -> None:
        """Sets a 32-bit flag of registered memory; what the stream did before can be seen by whoever sees it set."""

    def wait_flag(self, address: int, value: int) -> None:
        """Goes on once the flag minus `value` is not negative, as signed 32-bit numbers (`cuStreamWaitValue32` GEQ)."""

    def here(self) -> Event | None:
        """What this thread has enqueued on its current stream so far; None if all of that is done."""

    def following(self, point: Event | None) -> AbstractContextManager[None]:
        """What is enqueued from here on comes after `point`; within it, this is the thread's current stream."""

    def record(self) -> Event:
        """The point after all that was enqueued so far."""

    def precede(self, point: Event) -> bool:
        """What this thread enqueues next on its current stream comes after `point`, of this stream. False if the host
        itself does what the program does next."""

    def share(self, tensor: Tensor, point: Event) -> None:
        """A tensor of torch's, made on this stream, is used on the one of `point`, which `here` gave: its memory is not
        used for another before that stream is done with it."""

    def close(self) -> None:
        """Gives it back; all of it is done."""


class Driver(Protocol):
    """One device, as one process uses it. Calls raise `RuntimeError` with the device's own words."""

    name: str
    """What the transport is called."""
    chunk_bytes: int
    """The least memory that is worth a handle of its own."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory of the device, aligned to 512 bytes."""

    def free(self, address: int) -> None:
        """Gives back what `allocate` gave; no stream uses it any more."""

    def export(self, address: int) -> bytes:
        """A handle, of at most `HANDLE_BYTES`, by which another rank opens what `allocate` gave."""

    def open(self, handle: bytes, nbytes: int) -> int:
        """The address here of another rank's memory."""

    def close(self, address: int) -> None:
        """Ends what `open` began; no stream uses it any more."""

    def tensor(self, address: int, nbytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        """A 1-D tensor over memory, which keeps `owner`."""

    def program(self) -> Any:
        """The calling thread's current stream; None if the host does what the program does."""

    def point(self, program: Any) -> Event:
        """The point of a stream that `program` gave, after all that was enqueued there so far."""

    def host_memory(self, nbytes: int) -> Tensor:
        """Bytes of this process's memory that streams copy to and from quickly."""

    def register(self, address: int, nbytes: int) -> int:
        """Lets streams set and wait for flags in pages of host memory; the address by which they do."""

    def unregister(self, address: int) -> None:
        """Ends what `register` began, by the host's address."""

    def stream(self) -> Stream:
        """A new stream."""
