"""A device without a device: streams are threads that play their queues in order, memory is shared between processes.

It keeps to what `transports.cuda.driver` says and to no more: a stream may be slow, devices may be shared in time
slices, a flag orders only what came before it. Its own thread is the current stream of a program that uses it, so that
tensors are CPU tensors, and who reads a result has to wait for it. A test may break it (`Faults`), and must then fail.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import queue
import random
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ringred.transports import futex
from ringred.transports.cuda.driver import HANDLE_BYTES, Kernel

__all__ = ["FakeDevice", "Faults", "Slices"]

_HANDLE = struct.Struct("<QQQ")  # process, descriptor, length
_PAGE = mmap.PAGESIZE
_SHORTEST, _LONGEST = 1e-5, 5e-4  # seconds between two looks at a flag


@dataclass(frozen=True)
class Faults:
    """How a stream breaks the rules, so that tests show that they would notice."""

    ignores_waits: bool = False
    """Waits for no flag."""
    signals_early: bool = False
    """Sets a flag as soon as it is enqueued."""
    unfenced: bool = False
    """Data that was written before a flag is seen only after it."""


class Slices:
    """A device that does one thing at a time for all processes that were given this object's `path`."""

    def __init__(self, path: str | None = None) -> None:
        if path is None:
            descriptor, path = tempfile.mkstemp(prefix="ringred-slices-")
            os.close(descriptor)
        self.path = path

    def close(self) -> None:
        """Removes the file."""
        os.unlink(self.path)

    def opened(self) -> Callable[[], AbstractContextManager[None]]:
        """For one stream: a function that gives what holds the device."""
        file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

        @contextmanager
        def held() -> Any:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

        return held


class _Memory:
    """Memory as this process maps it."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.descriptor, self.nbytes = descriptor, nbytes
        self.mapped = mmap.mmap(descriptor, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapped))


class FakeDevice:
    """The driver of one rank. `delay` are the seconds that an operation takes at most, and a seed; `refuses_peers` says
    that no other rank's memory can be opened."""

    name = "cuda_ipc"
    chunk_bytes = 16 << 20
    _own: ClassVar[dict[tuple[int, int], _Memory]] = {}  # of all ranks that are threads of this process

    def __init__(
        self,
        *,
        delay: tuple[float, int] | None = None,
        slices: Slices | None = None,
        faults: Faults | None = None,
        refuses_peers: bool = False,
    ) -> None:
        self._delay, self._slices, self._faults = delay, slices, faults or Faults()
        self._refuses = refuses_peers
        self._allocated: dict[int, _Memory] = {}
        self._opened: dict[int, _Memory] = {}
        self._registered: dict[int, int] = {}
        self.current: _Stream | None = None
        """The program's stream; None if the host's thread does what the program does."""
        self._streams = itertools.count()

    def allocate(self, nbytes: int) -> int:
        descriptor = os.memfd_create("ringred-fake-device", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, -(-nbytes // _PAGE) * _PAGE)
        memory = _Memory(descriptor, nbytes)
        self._allocated[memory.address] = memory
        self._own[os.getpid(), descriptor] = memory
        return memory.address

    def free(self, address: int) -> None:
        memory = self._allocated.pop(address)
        del self._own[os.getpid(), memory.descriptor]
        os.close(memory.descriptor)

    def export(self, address: int) -> bytes:
        memory = self._allocated[address]
        handle = _HANDLE.pack(os.getpid(), memory.descriptor, memory.nbytes)
        assert len(handle) <= HANDLE_BYTES
        return handle

    def open(self, handle: bytes, nbytes: int) -> int:
        process, descriptor, length = _HANDLE.unpack(handle[: _HANDLE.size])
        if self._refuses:
            raise RuntimeError("peer access is not supported between these two devices")
        if length != nbytes:
            raise RuntimeError(f"invalid handle: expected memory of {nbytes} bytes, got {length}")
        if process == os.getpid():
            memory = self._own[process, descriptor]
            self._opened[memory.address] = memory  # stays mapped here, whoever frees it
            return memory.address
        try:
            opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as failure:
            raise RuntimeError(f"invalid handle: {failure}") from None
        memory = _Memory(opened, nbytes)
        os.close(opened)
        self._opened[memory.address] = memory
        return memory.address

    def close(self, address: int) -> None:
        self._opened.pop(address, None)

    def tensor(self, address: int, nbytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        if not nbytes:
            return torch.empty(0, dtype=dtype)
        memory: Any = (ctypes.c_char * nbytes).from_address(address)
        memory.owner = owner
        with torch.inference_mode(False):
            return torch.frombuffer(memory, dtype=dtype)

    def program(self) -> Any:
        return self.current

    def point(self, program: Any) -> _Event:
        event: _Event = program.record()
        return event

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def seen_by_the_host(self, tensor: Tensor) -> Tensor:
        """A tensor of the device as one of the CPU."""
        return tensor

    def register(self, address: int, nbytes: int) -> int:
        if address % _PAGE or address in self._registered:
            raise RuntimeError(f"host memory at {address:#x} is not at a page's start, or is registered already")
        self._registered[address] = nbytes
        return address

    def unregister(self, address: int) -> None:
        del self._registered[address]

    def is_registered(self, address: int) -> bool:
        """Whether a flag there lies in registered memory."""
        return any(start <= address and address + 4 <= start + nbytes for start, nbytes in self._registered.items())

    def stream(self) -> _Stream:
        held = (lambda: nullcontext()) if self._slices is None else self._slices.opened()
        return _Stream(self, self._delay, held, self._faults, next(self._streams))


class _Event:
    def __init__(self, stream: _Stream) -> None:
        self._stream, self._passed, self._at = stream, threading.Event(), 0.0

    def pass_by(self) -> None:
        self._at = time.monotonic()
        self._passed.set()

    def seconds_since(self, earlier: _Event) -> float:
        return self._at - earlier._at

    def wait(self) -> None:
        while not self._passed.wait(_LONGEST):
            if self._stream.failure is not None:
                raise RuntimeError(f"waited for a stream that failed: {self._stream.failure!r}")

    def done(self) -> bool:
        if self._stream.failure is not None:
            raise RuntimeError(f"the stream failed: {self._stream.failure!r}")
        return self._passed.is_set()


class _Stream:
    def __init__(
        self,
        device: FakeDevice,
        delay: tuple[float, int] | None,
        held: Callable[[], AbstractContextManager[None]],
        faults: Faults,
        number: int,
    ) -> None:
        self._device, self._delay, self._held, self._faults = device, delay, held, faults
        self._random = random.Random(f"{delay}/{number}")
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._within = threading.local()  # whether this thread is within `following`
        self._unseen: Callable[[], None] | None = None  # the last data that was written, where nothing was after it
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._play, name="ringred-fake-stream", daemon=True)
        self._thread.start()

    def _play(self) -> None:
        while (operation := self._queue.get()) is not None:
            if self.failure is not None:  # nothing is done after that, as on a device: its memory may be gone
                continue
            try:
                if self._delay is not None and self._random.random() < 0.3:
                    time.sleep(self._random.random() * self._delay[0])
                operation()
            except BaseException as failure:
                self.failure = failure
        if self.failure is None:
            self._see()

    def _see(self) -> None:
        unseen, self._unseen = self._unseen, None
        if unseen is not None:
            with self._held():
                unseen()

    def _write(self, data: Callable[[], None]) -> None:
        def operation() -> None:
            self._see()
            self._unseen = data

        self._queue.put(operation)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._write(lambda: futex.copy(target, source, nbytes))

    def fold(
        self, kernel: Kernel, out: Tensor, operands: Sequence[Tensor], final: bool, also: Sequence[int] = ()
    ) -> None:
        def data() -> None:
            target = self._device.seen_by_the_host(out)
            seen = [target if one is out else self._device.seen_by_the_host(one) for one in operands]
            kernel(target, seen, final)
            for address in also:
                futex.copy(address, target.data_ptr(), target.nbytes)

        self._write(data)

    def set_flag(self, address: int, value: int) -> None:
        if not self._device.is_registered(address):
            raise RuntimeError(f"a flag at {address:#x}, which is not registered")

        def set_it() -> None:
            ctypes.c_uint32.from_address(address).value = value

        def operation() -> None:
            if self._faults.unfenced:
                set_it()
                time.sleep(_LONGEST)
            self._see()
            set_it()

        if self._faults.signals_early:
            set_it()
        else:
            self._queue.put(operation)

    def wait_flag(self, address: int, value: int) -> None:
        if not self._device.is_registered(address):
            raise RuntimeError(f"a flag at {address:#x}, which is not registered")

        def operation() -> None:
            self._see()
            pause = _SHORTEST
            while ctypes.c_uint32.from_address(address).value - value & 1 << 31:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)

        if not self._faults.ignores_waits:
            self._queue.put(operation)

    def here(self) -> _Event | None:
        current = self._device.current
        return None if current is None else current.record()

    @contextmanager
    def following(self, point: Any) -> Iterator[None]:
        if point is not None:
            self._queue.put(point.wait)
        before = getattr(self._within, "it", False)
        self._within.it = True
        try:
            yield
        finally:
            self._within.it = before

    def precede(self, point: Any) -> bool:
        current = self._device.current
        if current is None or getattr(self._within, "it", False):  # the host does torch's operations
            return False
        current._queue.put(point.wait)
        return True

    def record(self) -> _Event:
        event = _Event(self)

        def operation() -> None:
            self._see()
            event.pass_by()

        if self._thread.is_alive():
            self._queue.put(operation)
        else:  # a stream that was closed has done all
            event.pass_by()
        return event

    def share(self, tensor: Tensor, point: Any) -> None:
        pass  # nobody else uses the host's memory

    def stall(self, seconds: float) -> None:
        """Does nothing for so long, when all before it can be seen."""

        def operation() -> None:
            self._see()
            time.sleep(seconds)

        self._queue.put(operation)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
