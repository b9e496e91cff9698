"""A runner's calls on a device: enqueued in order, and watched until the device is done, for the host goes on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ringred.errors import RingredError
from ringred.runtime.doing import Doing
from ringred.runtime.enqueued import Enqueued, hold
from ringred.runtime.work import Progress
from ringred.transports.base import Fault, Transport

__all__ = ["OnDevice"]

# A driver fails with a RuntimeError, CuPy's with kinds of its own; these kinds are no driver's.
_NOT_THE_DEVICES = (RingredError, NotImplementedError, RecursionError)
_PATIENCE = 0.001  # seconds before the first look at what nobody waits for

_DRAINING = 6.0  # seconds; a little more than a plane takes to give a stream up


class OnDevice:
    """The queue of `transport`; where it has none, everything is done at once, and there is nothing here to do.

    `failed(fault, waited, doing)` gives the exception of a call that failed, `gave_up(cause)` tells the peers of
    another failure. `blocking` makes the host wait for the device in every call.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        blocking: bool,
        failed: Callable[[Fault, float, Doing], RingredError],
        gave_up: Callable[[BaseException], None],
    ) -> None:
        self.queue = transport.queue
        self._transport, self._blocking, self._failed, self._gave_up = transport, blocking, failed, gave_up
        self._watch = Progress(f"ringred-watch-{name}-{transport.rank}")
        self._rests: deque[Enqueued] = deque()
        self._counting = threading.Lock()  # of what is watched
        self._watching = False
        self._waiters = 0  # threads of the host that wait for the device
        self._hurry = threading.Event()  # there are some
        self._drained_by: float | None = None  # when a stream that was to be drained is given up
        self._last: Enqueued | None = None
        self.failed: list[Enqueued] = []
        """The calls that failed after they had returned."""

    def here(self) -> Any:
        """The point of the calling thread's program, for `following`."""
        return None if self.queue is None else self.queue.here()

    @contextmanager
    def following(self, point: Any, timed: bool = True) -> Iterator[Any]:
        """What is done within it comes after `point`; gives the point of the queue at which it begins, if `timed`."""
        if self.queue is None:
            yield None
            return
        with self.queue.following(point):
            yield self.queue.record() if timed else None

    def torch_follows(self, deadline: float) -> None:
        """From here on torch's operations, within `following`, come after what is in the queue."""
        if self.queue is not None and not self.queue.precede(point := self.queue.record()):
            self._transport.passed(point, deadline)

    def passed(self, deadline: float) -> None:
        """Returns once all is done. Raises `Fault`."""
        if self.queue is not None:
            self._transport.passed(self.queue.record(), deadline)

    def rest(self, ready: Any, began: Any, deadline: float, doing: Doing, held: object) -> Enqueued | None:
        """What the device has still to do of all that was enqueued, watched from now on; see `Enqueued`."""
        if self.queue is None:
            return None
        precede = None if self._blocking else self.queue.precede
        rest = self._last = Enqueued(ready, began, self.queue.record(), deadline, doing, precede, self._waiting, held)
        with self._counting:
            self._rests.append(rest)
            watching, self._watching = self._watching, True
        if not watching:
            self._watch.submit(self._watch_all)
        return rest

    def rest_of_job(self, ready: Any, began: Any, deadline: float, made: object, job: object) -> Enqueued | None:
        """As `rest`, for a job of calls and torch's own operations that ran within `following(ready)`, and made the
        tensor `made`, or None. Errors name its last call, as those of all ranks do."""
        if self.queue is not None and isinstance(made, torch.Tensor):
            self.queue.share(made, ready)
        doing = Doing(0, "no collective", "") if self._last is None else self._last.doing
        return self.rest(ready, began, deadline, doing, (job, made))

    def finish(self) -> None:
        """Returns once what is watched has ended. Raises what the last of it failed with."""
        last = self._last
        if last is not None:
            last.finished()
            if last.failure is not None:
                last.heard = True
                raise last.failure

    def _watch_all(self) -> None:
        """Ends calls as the device comes past them. It looks now and then, for each look takes the interpreter from the
        thread that enqueues, unless somebody waits."""
        self._hurry.wait(_PATIENCE)
        while (rest := self._next_rest()) is not None:
            self._watched(rest)

    def _next_rest(self) -> Enqueued | None:
        with self._counting:
            if self._rests:
                return self._rests.popleft()
            self._watching = False
            return None

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Within it a thread of the host waits."""
        with self._counting:
            self._waiters += 1
            self._hurry.set()
        try:
            yield
        finally:
            with self._counting:
                self._waiters -= 1
                if not self._waiters:
                    self._hurry.clear()

    def _watched(self, rest: Enqueued) -> None:
        """Returns once the device has done the rest of a call, or that failed."""
        failure: BaseException | None = None
        began = time.monotonic()
        try:
            self._transport.passed(rest.point, rest.deadline, hurry=self._hurry)
        except Fault as fault:
            failure = self._failed(fault, time.monotonic() - began, rest.doing)
        except BaseException as failed:
            failure = self.named(failed, rest.doing)
            self._gave_up(failure)
        if failure is not None:
            self.failed.append(rest)
        rest.end(failure, self.drained_by() if failure is not None else 0.0)

    def named(self, failure: BaseException, doing: Doing) -> BaseException:
        """A failure of the device with the call that met it; any other as it is."""
        if self.queue is None or not isinstance(failure, RuntimeError) or isinstance(failure, _NOT_THE_DEVICES):
            return failure
        found = RingredError(f"rank {self._transport.rank}: {doing.text} at {doing.site}: its device failed: {failure}")
        found.__cause__ = failure
        return found

    def drained_by(self) -> float:
        """When a stream that was to be drained is given up: one time for all that is under way at a failure."""
        if self._drained_by is None:
            self._drained_by = time.monotonic() + _DRAINING
        return self._drained_by

    def hold(self, held: object) -> None:
        """Keeps what a call held that failed here, until the device is done with it."""
        if self.queue is not None:
            with suppress(RuntimeError):
                point, until = self.queue.record(), self.drained_by()
                self._watch.submit(lambda: hold(held, point, until))

    def close(self) -> None:
        """Returns once what is watched has ended."""
        with self._waiting():
            self._watch.close()
