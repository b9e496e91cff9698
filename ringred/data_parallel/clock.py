"""When the backwards of a model began and ended, and what they waited for: by the host's clock, or the device's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ringred.data_parallel.overlap import BackwardTimes, trace
from ringred.data_parallel.reductions import InFlight, Nothing
from ringred.runtime.trace import Tracer

__all__ = ["Clock"]

_ARRIVALS = 1000  # backward passes whose arrival times are kept
_UNREAD = 16  # backward passes that the host may be ahead of the device, and are still read


class Clock:
    """Notes the times of one reducer's backwards. On a device the host only enqueues, so that `here()`, the point that
    the program has come to, is noted as well (None where the host does what the program does), and the times are read
    when the device is done.
    """

    def __init__(self, here: Callable[[], Any]) -> None:
        self._here = here
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS)
        self._last: BackwardTimes | None = None
        self._unread: deque[tuple[BackwardTimes, Any, Any, list[Any]]] = deque(maxlen=_UNREAD)
        """Backwards that the device may not be done with: the host's times, the points at which they began and ended,
        and the rests of their reductions, None for one that was skipped."""
        self._began_ns = self._waited_ns = self._free_ns = 0
        self._in_backward = False
        self._began: Any = None
        self._free: Any = None  # the point at which the last reduction ended

    def forward_ended(self) -> None:
        """A backward may begin now."""
        self._began_ns, self._began = time.monotonic_ns(), self._here()
        self._in_backward = False

    def backward_began(self) -> None:
        """A backward has come to the outputs of forward."""
        if not self._in_backward:
            self.forward_ended()
            self._in_backward = True

    def waited(self, nanoseconds: int) -> None:
        """Forward spent time in collectives, which does not count as this rank's own."""
        self._waited_ns += nanoseconds

    def restart(self) -> None:
        """Forgets the arrivals: within `join` the ranks did not all do the same work."""
        self._arrivals.clear()
        self._free_ns = self._waited_ns = 0
        self._free = None

    def ended(self) -> tuple[int, Any]:
        """Now, when backward has ended and its reductions may not have."""
        return time.monotonic_ns(), self._here()

    def note(
        self,
        ended: tuple[int, Any],
        ready_ns: Sequence[int],
        full_ns: Sequence[int],
        works: Sequence[InFlight],
        buckets: tuple[Sequence[int], Sequence[int], Sequence[str]],
    ) -> None:
        """A backward was reduced; `buckets` are their bytes, numbers of parameters and algorithms."""
        self._read()
        if len(self._unread) == _UNREAD:  # the first of them will never be read
            self._free = None
        # Only numbers and points are kept: buckets would keep memory alive after new ones have replaced them.
        rests = [None if isinstance(work, Nothing) else getattr(work, "rest", None) for work in works]
        skipped = [isinstance(work, Nothing) for work in works]
        self._last = BackwardTimes(
            self._began_ns,
            ended[0],
            ready_ns,
            full_ns,
            [work.started_ns for work in works],
            [work.ended_ns for work in works],
            *buckets,
        )
        known = [
            skips or (rest is not None and rest.ready is not None) for rest, skips in zip(rests, skipped, strict=True)
        ]
        if self._began is not None and all(known) and not all(skipped):
            self._unread.append((self._last, self._began, ended[1], rests))
        else:
            self._free = None
            if self._free_ns:
                self._arrivals.append((max(full_ns) - self._free_ns - self._waited_ns) / 1e9)
        self._free_ns, self._waited_ns = max(work.ended_ns for work in works), 0

    def _read(self) -> None:
        """Puts the device's times in the place of those at which the host had enqueued backwards, as far as the device
        is done with them."""
        while self._unread:
            noted, began, ended, rests = self._unread[0]
            done = [rest for rest in rests if rest is not None]
            if not (ended.done() and all(rest.point.done() for rest in done)):
                return
            self._unread.popleft()
            times = _by_device(noted, began, ended, rests)
            if self._last is noted:
                self._last = times
            if self._free is not None:
                last = max((rest.ready for rest in done), key=lambda point: point.seconds_since(began))
                self._arrivals.append(last.seconds_since(self._free))
            self._free = max((rest.point for rest in done), key=lambda point: point.seconds_since(began))

    @property
    def last(self) -> BackwardTimes | None:
        """The times of the last backward that was reduced. Waits for the device."""
        for _, _, ended, rests in list(self._unread):
            for rest in rests:
                if rest is not None:
                    rest.finished()
            while not ended.done():
                time.sleep(0.0005)  # the program's own stream, which nobody watches
        self._read()
        return self._last

    @property
    def noted(self) -> bool:
        """Whether there was one."""
        return self._last is not None

    @property
    def arrivals(self) -> Sequence[float]:
        """For each of the last backwards: seconds from the end of the previous one's reductions until the last bucket
        was full, without the time that forward spent in collectives (on a device, with it)."""
        self._read()
        return self._arrivals

    def trace(self, tracer: Tracer | None) -> None:
        """Adds the last backward to the trace."""
        if tracer is not None and self.last is not None:
            trace(self.last, tracer)


def _by_device(noted: BackwardTimes, began: Any, ended: Any, rests: Sequence[Any]) -> BackwardTimes:
    """What the host `noted`, by the device's clock; reductions that were skipped keep their places in it."""

    def at(point: Any) -> int:
        return noted.began_ns + int(1e9 * point.seconds_since(began))

    ended_ns = at(ended)
    full = [ended_ns if rest is None else at(rest.ready) for rest in rests]

    def ready(enqueued_ns: int) -> int:
        """When the bucket of a gradient was full that the host had enqueued then; 0 stays, of delayed ones."""
        later = [when for put, when in zip(noted.full_ns, full, strict=True) if put >= enqueued_ns]
        return min(later, default=max(full)) if enqueued_ns else 0

    return replace(
        noted,
        ended_ns=ended_ns,
        full_ns=full,
        ready_ns=[ready(enqueued_ns) for enqueued_ns in noted.ready_ns],
        started_ns=[
            when if rest is None else max(at(rest.began), when) for rest, when in zip(rests, full, strict=True)
        ],
        done_ns=[when if rest is None else at(rest.point) for rest, when in zip(rests, full, strict=True)],
    )
