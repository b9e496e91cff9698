"""Repeats the reductions of a backward over the ranks that are left, until all of them have its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from ringred.data_parallel.backward import Backward, Forward
from ringred.data_parallel.recovery import Recovery

__all__ = ["carried_through"]


class Reduces(Protocol):
    """A reducer, as this module sees one."""

    weighed_again: Callable[[], Callable[[], float]] | None

    def new_backward(self, forward: Forward, launched: Callable[[], None] | None = None) -> Backward:
        """One over the ranks of now."""


def carried_through(reducer: Reduces, now: Backward, recovery: Recovery) -> Backward:
    """`now`, or what was repeated in its place, once all ranks that are left have its results."""

    def again() -> Backward:
        """Starts to reduce the gradients of `now` over the ranks of now: their samples alone count."""
        weighs = reducer.weighed_again
        scale = None if weighs is None or now.forward.scale is None else weighs()
        repeated = reducer.new_backward(dataclasses.replace(now.forward, scale=scale), _nothing)
        repeated.purpose, repeated.order, repeated.ready_ns = now.purpose, now.order, now.ready_ns
        repeated.again()
        return repeated

    def waited(attempt: Backward) -> None:
        attempt.wait()
        # On a device it was only enqueued. A communicator that others took the place of was done before it failed.
        if attempt.layout.members.parameters[0].device.type != "cpu" and attempt.layout.comm is recovery.comm:
            attempt.layout.comm.synchronize()

    return recovery.carried(now, now.layout.comm, again, waited)


def _nothing() -> None:
    pass
