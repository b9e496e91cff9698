"""When the backwards of a model began and ended, and what they waited for: by the host's clock, or the device's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ringred.data_parallel.overlap import BackwardTimes, trace
from ringred.data_parallel.reductions import InFlight
from ringred.runtime.trace import Tracer

__all__ = ["Clock"]

_ARRIVALS = 1000  # backward passes whose arrival times are kept


class Clock:
    """Notes the times of one reducer's backwards. On a device the host only enqueues, so that `here()`, the point that
    the program has come to, is noted as well (None where the host does what the program does), and the times are read
    when the device is done.
    """

    def __init__(self, here: Callable[[], Any]) -> None:
        self._here = here
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS)
        self._last: BackwardTimes | None = None
        self._unread: tuple[Any, Any, list[Any]] | None = None  # began, ended, and the rests of the reductions
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
        # Only numbers and points are kept: buckets would keep memory alive after new ones have replaced them.
        rests = [getattr(work, "rest", None) for work in works]
        self._last = BackwardTimes(
            self._began_ns,
            ended[0],
            ready_ns,
            full_ns,
            [work.started_ns for work in works],
            [work.ended_ns for work in works],
            *buckets,
        )
        self._unread = None
        if self._began is not None and all(rest is not None and rest.ready is not None for rest in rests):
            self._unread = self._began, ended[1], rests
        elif self._free_ns:
            self._arrivals.append((max(full_ns) - self._free_ns - self._waited_ns) / 1e9)
        self._free_ns, self._waited_ns = max(work.ended_ns for work in works), 0

    def _read(self) -> None:
        """Puts the device's times in the place of those at which the host had enqueued the last backward, if the device
        is done with it."""
        if self._unread is None or self._last is None:
            return
        began, ended, rests = self._unread
        if not (ended.done() and all(rest.point.done() for rest in rests)):
            return
        self._unread = None

        def at(point: Any) -> int:
            assert self._last is not None, "it is being read"
            return self._last.began_ns + int(1e9 * point.seconds_since(began))

        full = [at(rest.ready) for rest in rests]
        self._last = replace(
            self._last,
            ended_ns=at(ended),
            full_ns=full,
            ready_ns=[self._full_after(ready, full) for ready in self._last.ready_ns],
            started_ns=[max(at(rest.began), at(rest.ready)) for rest in rests],
            done_ns=[at(rest.point) for rest in rests],
        )
        if self._free is not None:
            last = max((rest.ready for rest in rests), key=at)
            self._arrivals.append(last.seconds_since(self._free))
        self._free = max((rest.point for rest in rests), key=at)

    def _full_after(self, ready_ns: int, full: Sequence[int]) -> int:
        """When the bucket of a gradient was full that the host had enqueued at `ready_ns`; 0 stays, of delayed ones."""
        assert self._last is not None, "it is being read"
        later = [at for enqueued, at in zip(self._last.full_ns, full, strict=True) if enqueued >= ready_ns]
        return min(later, default=max(full)) if ready_ns else 0

    @property
    def last(self) -> BackwardTimes | None:
        """The times of the last backward that was reduced. Waits for the device."""
        if self._unread is not None:
            for rest in self._unread[2]:
                rest.finished()
            while not self._unread[1].done():
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
