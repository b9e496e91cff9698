"""A transport around another one, for those that change what some of its calls do."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ringred.transports.base import Counters, Request, Transport, Windowed

__all__ = ["Wrapped"]


class Wrapped:
    """Passes every call on to `inner`. Plans are played by Python, so that every send and wait comes by here."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.name, self.model, self.rank, self.size = inner.name, inner.model, inner.rank, inner.size
        self.windows, self.buffers, self.segment_bytes = inner.windows, inner.buffers, inner.segment_bytes
        self.depth, self.queue, self.player = inner.depth, inner.queue, None

    @property
    def counters(self) -> Counters:
        return self.inner.counters

    @counters.setter
    def counters(self, value: Counters) -> None:
        self.inner.counters = value

    def begin(self, contract: int, turn: int) -> None:
        self.inner.begin(contract, turn)

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        return cast(Windowed, self.inner).empty(elements, dtype)

    def holds(self, memory: Tensor) -> bool:
        return cast(Windowed, self.inner).holds(memory)

    def expose(self, memory: Tensor | None) -> None:
        cast(Windowed, self.inner).expose(memory)

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> Request:
        return self.inner.isend(peer, src, put, buffered)

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> Request:
        return self.inner.irecv(peer, dst, lend)

    def wait(self, request: Request, deadline: float) -> Tensor | None:
        return self.inner.wait(request, deadline)

    def passed(self, point: Any, deadline: float, hurry: threading.Event | None = None) -> None:
        self.inner.passed(point, deadline, hurry)

    def release(self, request: Request) -> None:
        self.inner.release(request)

    def settle(self, deadline: float) -> None:
        self.inner.settle(deadline)

    def abort(self, report: str) -> None:
        self.inner.abort(report)

    def reports(self, timeout: float) -> dict[int, str]:
        return self.inner.reports(timeout)

    def subset(self, members: Sequence[int], key: str) -> Transport:
        return self.inner.subset(members, key)

    def close(self) -> None:
        self.inner.close()
