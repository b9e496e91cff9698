"""What happens to communicators when the process ends: they are closed, and peers hear of an uncaught exception."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

__all__ = ["Closable", "ending_with", "live", "report_uncaught"]


class Closable(Protocol):
    """A communicator, as this module sees one."""

    def abort(self, cause: BaseException) -> None:
        """Tells the peers that this rank failed."""

    def close(self) -> None:
        """Finishes and gives everything back."""


live: weakref.WeakSet[Closable] = weakref.WeakSet()
"""The communicators of this process that may still be open."""

_reports_uncaught = False
_end_jobs: list[Callable[[], None]] = []


@atexit.register
def _close_all() -> None:
    for comm in list(live):
        try:
            comm.close()
        except Exception as failure:  # continue, so that the other communicators are closed
            print(f"ringred: closing {comm!r}: {failure}", file=sys.stderr, flush=True)


def ending_with() -> BaseException | None:
    """The exception that is ending the caller's program or a part of it: the one that a `finally` runs under."""
    failure = sys.exc_info()[1]
    if isinstance(failure, SystemExit) and failure.code in (None, 0):
        return None
    return None if isinstance(failure, (GeneratorExit, StopIteration)) else failure


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
