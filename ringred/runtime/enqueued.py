"""What a device has still to do of a call when its host has done its part."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ringred.runtime.doing import Doing

__all__ = ["Enqueued", "hold"]

_kept: list[object] = []  # what devices that did not end may still use


def hold(held: object, point: Any, until: float) -> None:
    """Returns when the device has come to the point; if it has not by then, `held` is never let go."""
    with contextlib.suppress(RuntimeError):  # a device that failed does nothing any more
        while not point.done():
            if time.monotonic() > until:
                _kept.append(held)
                return
            time.sleep(0.001)  # after a failure only


class Enqueued:
    """A call whose end is the `point` of a queue, and that holds `held` until then. Before it come two others: `ready`
    is the program's, from which on it could begin (None if that was so at once), and `began` is the queue's, where it
    did. The runner watches it, and calls `end`. See `work.Rest`.

    `precede` is the queue's, or None where the host waits for the device in every call. Within `waiting` it does.
    """

    def __init__(
        self,
        ready: Any,
        began: Any,
        point: Any,
        deadline: float,
        doing: Doing,
        precede: Callable[[Any], bool] | None,
        waiting: Callable[[], AbstractContextManager[None]],
        held: object,
    ) -> None:
        self.ready, self.began, self.point = ready, began, point
        self.deadline, self.doing = deadline, doing
        self.failure: BaseException | None = None
        self.heard = False
        """Whether anybody was told of the failure."""
        self.ended_ns = 0
        self._precede, self._waiting, self._held = precede, waiting, held
        self._ended = threading.Event()

    def end(self, failure: BaseException | None, until: float = 0.0) -> None:
        """It is done, or failed. What it holds is kept until the device is done, after a failure too: for ever, if that
        is not so at the time `until`."""
        self.failure, self.ended_ns = failure, time.monotonic_ns()
        self._ended.set()
        held, self._held = self._held, None
        if failure is not None:
            hold(held, self.point, until)

    def done(self) -> bool:
        return self._ended.is_set()

    def finished(self) -> None:
        """Returns when the device did it, or failed."""
        self._wait(None)

    def _wait(self, timeout: float | None) -> bool:
        if self._ended.is_set():
            return True
        with self._waiting():
            return self._ended.wait(timeout)

    def wait(self, timeout: float | None) -> bool:
        ordered = self.done() or (self._precede is not None and self._precede(self.point))
        if not ordered and not self._wait(timeout):
            return False
        if self.failure is not None:
            self.heard = True
            raise self.failure
        return True
