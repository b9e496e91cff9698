"""Asynchronous work: the handle that an asynchronous call returns, and the thread that runs such calls in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, Protocol, TypeVar

from ringred.errors import CollectiveTimeout

__all__ = ["Progress", "Rest", "Work"]

T = TypeVar("T")


class Rest(Protocol):
    """What a device has still to do of a work when its host has done its part."""

    failure: BaseException | None
    ended_ns: int
    """When it was seen to be done, of time.monotonic_ns."""

    def done(self) -> bool:
        """Whether it did it, or failed; never blocks."""

    def wait(self, timeout: float | None) -> bool:
        """Makes what the calling thread's program does next come after it; False if that took `timeout` seconds. Raises
        its failure, as far as it is known."""


class Work(Generic[T]):
    """A collective that was started. It fails with the exception that the synchronous call would raise."""

    def __init__(self, description: str) -> None:
        self._future: Future[T] = Future()
        self._description = description
        self._heard = False
        self.rest: Rest | None = None  # set before the host's part is done
        self.started_ns = self._ended_ns = 0  # times of time.monotonic_ns, taken on the progress thread

    def wait(self, timeout: float | None = None) -> T:
        """Blocks until done and returns the result; raises the collective's exception, or `CollectiveTimeout`
        after `timeout` seconds, with the collective still in flight.

        For tensors of a CUDA device it blocks only until all is enqueued: what the program enqueues next, on the
        stream that is current here, comes after the collective.
        """
        began = time.monotonic()
        try:
            outcome = self._future.result(timeout)
            if self.rest is not None:
                left = None if timeout is None else max(0.0, began + timeout - time.monotonic())
                if not self.rest.wait(left):
                    raise FutureTimeout
        except FutureTimeout:
            if not self.is_completed():
                raise CollectiveTimeout(f"{self._description}: not done after waiting {timeout:g} s") from None
            if self.exception() is None:  # it was done at the last moment
                return self._future.result()
            self._heard = True
            raise
        except BaseException:
            self._heard = True
            raise
        return outcome

    result = wait

    def failed_unheard(self) -> bool:
        """Whether it failed and nobody has waited for it."""
        return self.exception() is not None and not self._heard

    def is_completed(self) -> bool:
        """Whether the work is done, by the device too, successfully or not; never blocks."""
        return self._future.done() and (self.rest is None or self.rest.done())

    def exception(self) -> BaseException | None:
        """The exception of the work, or None if it succeeded or is not done yet; never blocks."""
        if not self._future.done():
            return None
        return self._future.exception() or (None if self.rest is None else self.rest.failure)

    def on_done(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when the work is done, or enqueued on a device: on the progress thread, or immediately if it
        is done already.

        `callback` may start further collectives with `async_op=True`, but must not wait for any.
        """
        self._future.add_done_callback(lambda future: callback())

    def finish(self, job: Callable[[], T]) -> None:
        """Runs `job` and stores its result or exception. Called by the communicator, not by users."""
        self.started_ns = time.monotonic_ns()
        try:
            outcome = job()
        except BaseException as failure:
            self._ended_ns = time.monotonic_ns()
            self._future.set_exception(failure)
        else:
            self._ended_ns = time.monotonic_ns()
            self._future.set_result(outcome)

    @property
    def ended_ns(self) -> int:
        """When it was done, of time.monotonic_ns; 0 before."""
        return self._ended_ns if self.rest is None else self.rest.ended_ns


class Progress:
    """A thread that runs jobs in the order in which they were submitted. It starts with the first job, and sleeps in
    the kernel while there is none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._busy = False
        self._closing = False
        self._thread: threading.Thread | None = None

    def idle(self) -> bool:
        """Whether no job is running or queued; only reliable while no other thread submits jobs."""
        return not self._jobs and not self._busy  # in this order: a job is marked busy before it is taken

    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return self._thread is threading.current_thread()

    def submit(self, job: Callable[[], None]) -> None:
        """Appends `job`, which must not raise."""
        with self._wake:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._wake.notify()

    def let_end(self) -> None:
        """Lets the thread end once it has run what is queued."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def close(self) -> None:
        """Runs what is queued and ends the thread."""
        self.let_end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._busy = False
                while not self._jobs and not self._closing:
                    self._wake.wait()
                if not self._jobs:
                    return
                self._busy = True
                job = self._jobs.popleft()
            job()
            del job  # it holds tensors
