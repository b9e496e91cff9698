"""When a worker may go on: the coordinator's releases, from a word of shared memory, or as messages."""

from __future__ import annotations

import time
from typing import Any

from ringred.errors import CollectiveTimeout
from ringred.parameter_server import messages as m
from ringred.parameter_server.connection import Connection
from ringred.parameter_server.shared import SharedValues

__all__ = ["Releases"]

_AGAIN = 1.0  # seconds after which a release that did not come is asked for again
_SLICE = 0.05  # seconds of sleep on a word, after which messages are looked at
_POLL = 0.02


class Releases:
    """The releases of worker `number`. `pulled` is the version of its parameters, -1 before the first pull."""

    def __init__(self, number: int, connection: Connection) -> None:
        self.number, self.connection = number, connection
        self.pulled = -1
        self._last = m.Released(0, 0, 0)
        self._used = 0  # the last one that `begin` has taken

    def told(self, message: Any) -> None:
        """A release that came as a message."""
        if isinstance(message, m.Released) and message.number > self._last.number:
            self._last = message

    @property
    def over(self) -> bool:
        """Whether the last one taken was the last one of all."""
        return self._last.how == m.OVER and self._last.number == self._used

    @property
    def never(self) -> bool:
        """Whether none was taken yet."""
        return self._used == 0

    def begin(self, timeout: float, policy: str) -> int:
        """Waits for the next one, and returns the version that the worker must pull at least. Raises
        `CollectiveTimeout`."""
        began = asked = time.monotonic()
        while not self.is_there():
            now = time.monotonic()
            if now - began > timeout:
                raise CollectiveTimeout(
                    f"worker {self.number}: {policy} did not release it within {timeout:g} s: the others are slow "
                    "or gone"
                )
            if now - asked > _AGAIN:  # it may have been lost
                asked = now
                self.connection.send(m.COORDINATOR, m.Await(self.number, self.connection.life, self._used))
            self._wait(_POLL)
        self._used = self._last.number
        return self._last.version

    @property
    def cancelled(self) -> bool:
        """Whether the mini-batch in progress is not wanted any more."""
        if self._word() is None:
            self.connection.poll(0.0, self.connection.server_of(m.COORDINATOR))
        return self.is_there() and self._last.how != m.PLAIN

    def sleep(self, seconds: float) -> bool:
        """Waits as long, or until the mini-batch in progress is cancelled; whether it was not."""
        until = time.monotonic() + seconds
        while not (self.is_there() and self._last.how != m.PLAIN):
            left = until - time.monotonic()
            if left <= 0:
                return True
            # An idle processor wakes late, and later the longer it was idle: the last millisecond is slept by itself.
            self._wait(left - 0.001 if left > 0.002 else left)
        return False

    def _word(self) -> SharedValues | None:
        """The memory that the coordinator writes to, if this worker sees it."""
        return self.connection.values.get(self.connection.server_of(m.COORDINATOR))

    def _wait(self, seconds: float) -> None:
        """Until another release is there, or at most as long. Raises what a server said that ends the work."""
        word = self._word()
        server = self.connection.server_of(m.COORDINATOR)
        if word is not None:
            slept = word.wait_for_release(self.number, self._last.number, min(seconds, _SLICE))
            if not slept:
                return
            self.connection.poll(0.0, server)
        elif seconds < 0.001:  # less than a poll can wait
            time.sleep(seconds)
        else:
            self.connection.poll(seconds, server)

    def is_there(self) -> bool:
        """Whether there is one that was not taken. One that cancels what is older than what this worker has pulled
        already tells it nothing new, and is taken."""
        word = self._word()
        if word is not None:
            self.told(word.released(self.number))
        last = self._last
        if last.how == m.CANCELLED and self.pulled >= last.version:
            self._used = max(self._used, last.number)
        return last.number > self._used
