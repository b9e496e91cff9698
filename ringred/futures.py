"""Works as torch's futures, for DDP's hooks and for whoever chains callbacks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from ringred.work import Work

__all__ = ["future_of"]

_T = TypeVar("_T")
_THREADS = 64  # at the most; one is started where all others wait

_pool: tuple[int, ThreadPoolExecutor] | None = None


def future_of(works: Sequence[Work[Any]] | None, outcome: Callable[[], _T]) -> Any:
    """A `torch.futures.Future[T]` of what `outcome()` returns, or raises, once `works` are done; with None, `outcome`
    waits itself.

    Callbacks run on threads that may wait: one may start a collective and wait for it, as PowerSGD's does. The future
    is a `then` of another, since torch's C++ takes one whose exception was set by hand for a success.
    """
    done: Any = torch.futures.Future()
    future = done.then(lambda _: outcome())
    if works is None:
        _hand_over(done)
    elif works:
        works[-1].on_done(lambda: _hand_over(done))
    else:
        done.set_result(None)
    return future


def _hand_over(done: Any) -> None:
    global _pool
    if _pool is None or _pool[0] != os.getpid():  # the threads of a parent process are not here
        _pool = os.getpid(), ThreadPoolExecutor(_THREADS, "ringred-callbacks")
    _pool[1].submit(done.set_result, None)
