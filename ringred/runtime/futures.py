"""Converts works to torch futures, for DDP's hooks and for callers that chain callbacks."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch

from ringred.runtime import lifetime
from ringred.runtime.work import Work

__all__ = ["future_of"]

_T = TypeVar("_T")
_IDLE_SECONDS = 10.0  # after which a thread without work ends


def future_of(works: Sequence[Work[Any]], outcome: Callable[[], _T], devices: Collection[torch.device] = ()) -> Any:
    """A `torch.futures.Future[T]` with the result or exception of `outcome()`, called once `works` are done, or
    enqueued on a device.

    Where results are on CUDA `devices`, the future orders streams as torch's own do: a callback has one of its own.

    Callbacks run on threads that may wait: one may start a collective and wait for it, as PowerSGD's does. The future
    is made by `then` of another one, because torch's C++ takes a future whose exception was set directly for a success.
    """
    done: Any = torch.futures.Future(devices=[device for device in devices if device.type == "cuda"])
    future = done.then(lambda _: outcome())
    if works:
        works[-1].on_done(lambda: _callbacks.complete(done))
    else:
        done.set_result(None)
    return future


class _Callbacks:
    """Threads that complete futures and run their callbacks; a new thread is started if all others are busy."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._ready: deque[Any] = deque()
        self._idle = self._busy = 0
        self._ending = False

    def complete(self, done: Any) -> None:
        with self._news:
            self._ready.append(done)
            if len(self._ready) <= self._idle:
                self._news.notify_all()
                return
        threading.Thread(target=self._run, name="ringred-callbacks", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._news:
                self._idle += 1
                self._news.wait_for(lambda: self._ready or self._ending, _IDLE_SECONDS)
                self._idle -= 1
                if not self._ready:
                    self._news.notify_all()
                    return
                done = self._ready.popleft()
                self._busy += 1
            done.set_result(None)
            del done  # it holds tensors
            with self._news:
                self._busy -= 1
                self._news.notify_all()

    def settle(self, limit: float) -> None:
        """Called at exit: waits for running callbacks, at most `limit` seconds, because a thread must not be killed
        inside torch."""
        with self._news:
            self._ending = True
            self._news.notify_all()
            self._news.wait_for(lambda: not (self._busy or self._idle or self._ready), limit)


def _begin_anew() -> None:
    global _callbacks
    _callbacks = _Callbacks()


_callbacks = _Callbacks()
lifetime.afterwards.append(lambda limit: _callbacks.settle(limit))  # those that lanes and closing have ended as well
os.register_at_fork(after_in_child=_begin_anew)  # the threads of a parent are not in its child
