"""Repeats the reductions of a backward over the ranks that are left, until all of them have its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from ringred.data_parallel.backward import Backward, Forward
from ringred.data_parallel.layout import Layout
from ringred.data_parallel.recovery import RECOVERABLE, Recovery

__all__ = ["carried_through"]


class Reduces(Protocol):
    """A reducer, as this module sees one."""

    layout: Layout
    weighed_again: Callable[[], Callable[[], float]] | None

    def new_backward(self, forward: Forward, launched: Callable[[], None] | None = None) -> Backward:
        """One over the ranks of now."""


def carried_through(reducer: Reduces, now: Backward, recovery: Recovery) -> Backward:
    """`now`, or what was repeated in its place, once all ranks that are left have its results."""
    attempt = now
    while True:
        try:
            if attempt.layout is not reducer.layout and not recovery.behind():
                attempt = _again(reducer, now)
            attempt.wait()
            if recovery.behind():  # others know that all have them
                recovery.passed()
            else:
                recovery.commit()
            return attempt
        except RECOVERABLE as failure:
            recovery.renew(failure)


def _again(reducer: Reduces, now: Backward) -> Backward:
    """Starts to reduce the gradients of `now` over the ranks of now: their samples alone count."""
    weighs = reducer.weighed_again
    scale = None if weighs is None or now.forward.scale is None else weighs()
    again = reducer.new_backward(dataclasses.replace(now.forward, scale=scale), _nothing)
    again.purpose, again.order, again.ready_ns = now.purpose, now.order, now.ready_ns
    again.again()
    return again


def _nothing() -> None:
    pass
