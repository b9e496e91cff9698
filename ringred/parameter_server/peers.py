"""Who met a server: their windows, and whether they live, as the kernel or their silence tells."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import zmq
from torch import Tensor

from ringred.parameter_server import messages as m
from ringred.parameter_server.pulse import SILENCE, whose
from ringred.parameter_server.shared import map_window
from ringred.transports.windows import Window

__all__ = ["Peer", "Peers"]


class Peer(NamedTuple):
    """A worker, in one of its lives; -1: another server. Its process, if it is of this place, as a descriptor that ends
    with it, else -1. Whether memory is shared with it."""

    worker: int
    life: int
    process: int
    shared: bool


class Peers:
    """Those who met the server of `place`; their processes are watched by `poller`."""

    def __init__(self, poller: zmq.Poller, place: str) -> None:
        self._poller, self._place = poller, place
        self._known: dict[bytes, Peer] = {}
        self._windows: dict[bytes, Window] = {}
        self._heard: dict[bytes, float] = {}  # when those of other places were heard of
        self._left: deque[tuple[float, bytes]] = deque()  # windows of workers that are gone

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._known))

    @property
    def lives(self) -> set[tuple[int, int]]:
        """The workers that are there, and their lives."""
        return {(known.worker, known.life) for known in self._known.values()}

    def __contains__(self, name: bytes) -> bool:
        return name in self._known

    def meet(self, name: bytes, message: m.Meet) -> tuple[bool, bool]:
        """Shares memory with a worker of the same place, and watches its process. Whether it is of this place, and
        whether its memory is shared."""
        process, shared = -1, False
        near = bool(self._place) and message.place == self._place
        if near:
            with contextlib.suppress(OSError, OverflowError):
                process = os.pidfd_open(message.pid)
            with contextlib.suppress(OSError, OverflowError, ValueError, TypeError):  # it says what it likes
                if message.descriptor >= 0:
                    self._windows[name] = map_window(message.pid, message.descriptor)
                    shared = True
        self._forget(name)
        if message.pid == os.getpid() and process >= 0:  # a thread of this process ends by itself
            os.close(process)
            process = -1
        self._known[name] = Peer(message.worker, message.life, process, shared)
        if process >= 0:
            self._poller.register(process, select.POLLIN)
        elif not near:
            self._heard[name] = time.monotonic()
        return near, shared

    def sharer(self, name: bytes) -> int:
        """The worker of that name, if memory is shared with it; else -1."""
        known = self._known.get(name)
        return known.worker if known is not None and known.shared else -1

    def heard_of(self, name: bytes) -> None:
        """Something came from there, or its pulse."""
        if whose(name) in self._heard:
            self._heard[whose(name)] = time.monotonic()

    def gone(self, ready: Mapping[Any, int]) -> Iterator[tuple[Peer, str]]:
        """Those whose processes ended, or who were silent for too long, and how."""
        for name in [name for name, known in self._known.items() if known.process in ready]:
            yield self._lose(name), "its process ended"
        now = time.monotonic()
        for name in [name for name, heard in self._heard.items() if now - heard > SILENCE]:
            yield self._lose(name), f"was not heard of for {SILENCE:.0f} s"
        while self._left and now - self._left[0][0] > SILENCE:  # until then a copy may be given what lies there
            self._windows.pop(self._left.popleft()[1], None)

    def _lose(self, name: bytes) -> Peer:
        known = self._known[name]
        self._forget(name)
        self._left.append((time.monotonic(), name))
        return known

    def _forget(self, name: bytes) -> None:
        known = self._known.pop(name, None)
        if known is not None and known.process >= 0:
            self._poller.unregister(known.process)
            os.close(known.process)
        self._heard.pop(name, None)

    def memory(self, name: bytes, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """A part of a worker's window, 1-D. Raises `ValueError` for what does not lie in it."""
        window = self._windows.get(name)
        if window is None or not 0 <= offset <= window.nbytes - nbytes or offset % dtype.itemsize:
            raise ValueError(f"{nbytes} bytes at {offset} are not in a window of this worker")
        return window.view(offset, nbytes, dtype) if nbytes else torch.empty(0, dtype=dtype)

    def copied(self, name: bytes, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """As `memory`, for a shard's copy: the worker writes there again once the shard itself is done with it."""
        return self.memory(name, offset, nbytes, dtype).clone()

    def close(self) -> None:
        """Forgets all of them."""
        for known in self._known.values():
            if known.process >= 0:
                os.close(known.process)
        self._known.clear()
        self._windows.clear()
