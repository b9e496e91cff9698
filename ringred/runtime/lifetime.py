"""What happens to communicators when the process ends: they are closed, and peers hear of an uncaught exception."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol

from ringred.transports.membership.listener import end_thread

__all__ = ["Closable", "afterwards", "ending_with", "live", "report_uncaught"]


class Closable(Protocol):
    """A communicator, as this module sees one."""

    def abort(self, cause: BaseException) -> None:
        """Tells the peers that this rank failed."""

    def close(self) -> None:
        """Finishes and gives everything back."""


live: weakref.WeakSet[Closable] = weakref.WeakSet()
"""The communicators of this process that may still be open."""

_BETWEEN = ("ringred.", "torch.", "contextlib")  # modules between the user's function and `close`
_reports_uncaught = False
_end_jobs: list[Callable[[], None]] = []
_SERVICE_SECONDS = 2.0  # for a thread to end

afterwards: list[Callable[[float], None]] = [end_thread]
"""Called at exit with a time limit in seconds, once all communicators are closed: they end the threads of this process
that serve all. One that wakes up while the interpreter is torn down would be killed on the spot."""


@atexit.register
def _close_all() -> None:
    for comm in list(live):
        try:
            comm.close()
        except Exception as failure:  # continue, so that the other communicators are closed
            print(f"ringred: closing {comm!r}: {failure}", file=sys.stderr, flush=True)
    for end in afterwards:
        end(_SERVICE_SECONDS)


def ending_with() -> BaseException | None:
    """The exception that the caller's function is left by, or was left by: the one that its `finally` or `except` runs
    under. None if that is only dealt with further out, as where `except` tries again with other arguments."""
    failure = sys.exc_info()[1]
    if isinstance(failure, SystemExit) and failure.code in (None, 0):
        return None
    if failure is None or isinstance(failure, (GeneratorExit, StopIteration)):
        return None
    passed, step = set(), failure.__traceback__
    while step is not None:
        passed.add(step.tb_frame)
        step = step.tb_next
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame not in passed and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame = frame.f_back
    return failure if frame in passed else None


def report_uncaught(end_job: Callable[[], None] | None = None) -> None:
    """Makes an uncaught exception known to the peers: a rank that just ended would leave them waiting.

    `end_job` is called once they have been told.
    """
    global _reports_uncaught
    if end_job is not None:
        _end_jobs[:] = [end_job]
    if _reports_uncaught:
        return
    _reports_uncaught = True
    earlier = sys.excepthook

    def report(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        earlier(kind, value, traceback)
        sys.stderr.flush()
        for comm in list(live):
            comm.abort(value)
        for end in _end_jobs:
            end()

    sys.excepthook = report
