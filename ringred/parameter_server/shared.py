"""Shared memory between the servers and the workers of one host: the windows of the `shm` transport.

A worker reads values where the server keeps them, and the server reads gradients where the worker put them; messages
only say where. A reader copies, and looks whether an update came in between (Lamport, Concurrent Reading and Writing,
1977): the server never waits for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ringred.parameter_server import messages as m
from ringred.parameter_server.shard import Memory
from ringred.transports import futex
from ringred.transports.membership import card
from ringred.transports.windows import Heap, Window, adopt, create

__all__ = ["WORKERS", "Area", "SharedMemory", "SharedValues", "map_window", "place"]

WORKERS = 1 << 12
"""Workers that a server's window has a word for."""
_SHARERS = 64
_FINISHED, _RELEASES, _VERSIONS = 1, 1 + WORKERS, 1 + 2 * WORKERS  # where these words begin
_HEAD_WORDS = 1 + 3 * WORKERS
_SLICE = 0.05  # seconds that a reader sleeps at once


def place() -> str:
    """A text that is the same in processes that can open each other's windows: one kernel, one user, and one view of
    processes and of the network. Empty where that does not work at all."""
    if futex.unavailable() is not None:
        return ""
    try:
        return f"{card.place()}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


class Area:
    """A window of this process, to allocate from; others open it by `process` and `descriptor`."""

    def __init__(self) -> None:
        self.descriptor, self.window = create(_SHARERS)
        self.process = os.getpid()
        self.heap = Heap(self.window)

    def offset(self, tensor: Tensor) -> int:
        """Where `tensor`, which was allocated here, lies in the window."""
        return tensor.data_ptr() - self.window.address

    def close(self) -> None:
        """Nobody can open it any more; memory that is in use stays."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def map_window(process: int, descriptor: int) -> Window:
    """The window of another process of the same place. Raises `OSError`."""
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return adopt(opened)
    finally:
        os.close(opened)


class SharedMemory(Memory):
    """A shard's values in `area`.

    The head is a word for the version, twice the version while the values are those of a version and one more while
    they change. For each worker there is a word with one more than its last sequence number that is not looked at any
    more, and, where the coordinator is, two with its last release: four times its number and how; the version.
    """

    def __init__(self, area: Area) -> None:
        self.area = area
        self._block = area.heap.empty(_HEAD_WORDS, torch.int64).zero_()
        self.head = area.offset(self._block)
        first = self.head // 8
        self._words = area.window.words[first : first + _HEAD_WORDS]
        self._address = area.window.address + self.head

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        return self.area.heap.empty(elements, dtype)

    def offset(self, value: Tensor) -> int:
        return self.area.offset(value) if value.numel() else 0

    def changing(self, version: int) -> None:
        self._words[0] = 2 * version + 1
        futex.fence()

    def changed(self, version: int) -> None:
        self._words[0] = 2 * version
        futex.wake(self._address)

    def finished(self, worker: int, sequence: int) -> None:
        if worker < WORKERS:
            self._words[_FINISHED + worker] = sequence + 1

    def release(self, worker: int, released: m.Released) -> None:
        """Worker `worker` is released, and woken if it waits for that."""
        self._words[_VERSIONS + worker] = released.version
        self._words[_RELEASES + worker] = 4 * released.number + released.how
        futex.wake(self._address + 8 * (_RELEASES + worker))

    def forget_release(self, worker: int) -> None:
        """What was said to an earlier life of the worker is not for the next."""
        self._words[_RELEASES + worker] = 0


class SharedValues:
    """A shard's values as a worker sees them: `window` is the server's, the head lies at `head`."""

    def __init__(self, window: Window, head: int) -> None:
        self.window = window
        self._address = window.address + head
        self._words = window.words[head // 8 : head // 8 + _HEAD_WORDS]

    @property
    def version(self) -> int:
        return self._words[0] >> 1

    def wait(self, version: int, deadline: float, interrupted: Callable[[], bool]) -> bool:
        """Whether the values are of `version` or newer before `deadline` (of `time.monotonic`); looks from time to time
        whether it is `interrupted`."""
        while True:
            word = self._words[0]
            if word >= 2 * version:
                return True
            if time.monotonic() > deadline or interrupted():
                return False
            futex.sleep(self._address, word & 0xFFFFFFFF, _SLICE)

    def read(self, version: int, offset: int, out: Tensor, tries: int = 8) -> int | None:
        """Copies the values at `offset` to `out`, 1-D, and returns their version, `version` or newer; None if updates
        came in between each of `tries` times."""
        for _ in range(tries):
            before = self._words[0]
            if before & 1 or before < 2 * version:
                futex.sleep(self._address, before & 0xFFFFFFFF, 0.002)
                continue
            futex.copy(out.data_ptr(), self.window.address + offset, out.nbytes)
            if self._words[0] == before:
                return before >> 1
        return None

    def finished(self, worker: int) -> int:
        """The last of the worker's sequence numbers whose gradients are not looked at any more."""
        return self._words[_FINISHED + worker] - 1

    def released(self, worker: int) -> m.Released:
        """The worker's last release."""
        while True:
            before = self._words[_RELEASES + worker]
            version = self._words[_VERSIONS + worker]
            if self._words[_RELEASES + worker] == before:
                return m.Released(version, before >> 2, before & 3)

    def wait_for_release(self, worker: int, number: int, seconds: float) -> bool:
        """Sleeps as long, or until the worker has a release after that of this number; whether it has none."""
        word = self._words[_RELEASES + worker]
        if word >> 2 <= number:
            futex.sleep(self._address + 8 * (_RELEASES + worker), word & 0xFFFFFFFF, seconds)
        return self._words[_RELEASES + worker] >> 2 <= number
