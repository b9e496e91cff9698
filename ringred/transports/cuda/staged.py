"""Messages of device memory between hosts: by host memory, over a transport that knows nothing of devices.

A send is copied to the host by the stream, and posted when it is there; what arrives is copied to the device by the
stream. So only the thread waits for its own device, and a stream never waits for a host.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringred.transports.base import Counters, Fault, FaultKind, Request, Transport
from ringred.transports.cuda.driver import Driver, Event
from ringred.transports.cuda.queue import StreamQueue

__all__ = ["StagedTransport"]

_LEAST_BYTES = 512
_POOLED = 64  # buffers of one size that are kept
_LOOK = 0.0002  # seconds between two looks at a stream
_ENDING = 5.0  # seconds that a stream may take when all is over
_kept: list[object] = []  # what a stream that does not end may still use


@dataclass(slots=True)
class _Receive:
    inner: Request
    buffer: Tensor
    near: Tensor
    target: Tensor
    lend: bool


@dataclass(slots=True)
class _Send:
    inner: Request
    buffer: Tensor


class StagedTransport:
    """`far`, for memory of the device of `driver`. The copies of a collective take at most `timeout` seconds.

    Beside a transport of device memory to the ranks of its host it uses that one's queue (`beside`).
    """

    windows = buffers = False
    player = None

    def __init__(self, far: Transport, driver: Driver, timeout: float) -> None:
        self.far, self._driver, self.timeout = far, driver, timeout
        self._deadline = 0.0  # of the collective's copies to the host
        self.name, self.model, self.segment_bytes = far.name, far.model, far.segment_bytes
        self.rank, self.size, self.depth = far.rank, far.size, far.depth
        self._queue: StreamQueue | None = None
        self._is_passed: Callable[[Any, float], None] = self._poll
        self._own = False
        self._pool: dict[int, list[Tensor]] = {}
        self._in_use: deque[tuple[Event, Tensor | None, Tensor | None]] = deque()
        """What the stream uses until it has passed an event: buffers, and memory that was lent."""
        if hasattr(far, "progress"):
            self.progress = far.progress

    def beside(self, queue: StreamQueue, passed: Callable[[Any, float], None]) -> None:
        """From here on copies go to this `queue`; `passed` waits for its points."""
        self._queue, self._is_passed = queue, passed

    @property
    def queue(self) -> StreamQueue:
        if self._queue is None:
            self._queue, self._own = StreamQueue(self._driver), True
        return self._queue

    @property
    def counters(self) -> Counters:
        return self.far.counters

    @counters.setter
    def counters(self, value: Counters) -> None:
        self.far.counters = value

    # ------------------------------------------------------------------ messages

    def begin(self, contract: int, turn: int) -> None:
        self._deadline = time.monotonic() + self.timeout
        self.far.begin(contract, turn)

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> _Send:
        buffer, near = self._buffer(src)
        if src.nbytes:
            self.queue.stream.copy(near.data_ptr(), src.data_ptr(), src.nbytes)
            self.passed(self.queue.record(), self._deadline)
        return _Send(self.far.isend(peer, near), buffer)

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> _Receive:
        buffer, near = self._buffer(dst)
        return _Receive(self.far.irecv(peer, near, False), buffer, near, dst, lend)

    def wait(self, request: _Send | _Receive | None, deadline: float) -> Tensor | None:
        if request is None:
            return None
        self.far.wait(request.inner, deadline)
        if isinstance(request, _Send):
            self._give_back(request.buffer)
            return None
        target = torch.empty_like(request.target) if request.lend else request.target
        if target.nbytes:
            self.queue.stream.copy(target.data_ptr(), request.near.data_ptr(), target.nbytes)
        self._in_use.append((self.queue.record(), request.buffer, None))
        if not request.lend:
            return None
        request.target = target
        return target

    def release(self, request: _Receive) -> None:
        self._in_use.append((self.queue.record(), None, request.target))
        self._reclaim()

    def _buffer(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Host memory, and as many elements of it."""
        self._reclaim()
        nbytes = max(_LEAST_BYTES, 1 << max(0, like.nbytes - 1).bit_length())
        free = self._pool.get(nbytes)
        buffer = free.pop() if free else self._driver.host_memory(nbytes)
        return buffer, buffer[: like.nbytes].view(like.dtype)

    def _give_back(self, buffer: Tensor) -> None:
        free = self._pool.setdefault(buffer.nbytes, [])
        if len(free) < _POOLED:
            free.append(buffer)

    def _reclaim(self) -> None:
        while self._in_use and self._in_use[0][0].done():
            _, buffer, _ = self._in_use.popleft()
            if buffer is not None:
                self._give_back(buffer)

    # ------------------------------------------------------------------ waiting and ending

    def passed(self, point: Event, deadline: float, hurry: threading.Event | None = None) -> None:
        self._is_passed(point, deadline)

    def _poll(self, point: Event, deadline: float) -> None:
        while not point.done():
            if time.monotonic() > deadline:
                raise Fault(FaultKind.TIMEOUT, self.rank, "the device is not done")
            time.sleep(_LOOK)  # nothing can wake this thread

    def settle(self, deadline: float) -> None:
        self.far.settle(deadline)

    def abort(self, report: str) -> None:
        self.far.abort(report)

    def reports(self, timeout: float) -> dict[int, str]:
        return self.far.reports(timeout)

    def subset(self, members: Sequence[int], key: str) -> StagedTransport:
        return StagedTransport(self.far.subset(members, key), self._driver, self.timeout)

    def close(self) -> None:
        self.far.close()
        queue, self._queue = self._queue, None
        if queue is None:
            return
        try:
            deadline = time.monotonic() + _ENDING
            for event in [event for event, *_ in self._in_use] + ([queue.record()] if self._own else []):
                self._poll(event, deadline)
        except (Fault, RuntimeError):  # a device that stands still, or failed
            _kept.append((queue, self._in_use, self._pool))
        else:
            if self._own:
                queue.stream.close()
