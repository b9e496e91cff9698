"""A board: small values by name, which processes of a job put up and wait for, to connect to each other by them."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Sequence

__all__ = ["Board"]


class Board:
    """The values, and who waits for some that are not there yet. Thread-safe."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._waiting: list[tuple[Sequence[str], concurrent.futures.Future[dict[str, str | None]]]] = []
        self._lock = threading.Lock()

    def put(self, name: str, value: str) -> None:
        """Sets a value, and tells who waits for it."""
        with self._lock:
            self._values[name] = value
            self._tell()

    def add(self, name: str, number: int) -> int:
        """Adds to a value that is a number; one that is not there is 0. Raises `ValueError`."""
        with self._lock:
            total = int(self._values.get(name, "0")) + number
            self._values[name] = str(total)
            self._tell()
            return total

    def advance(self, name: str, number: int) -> bool:
        """Raises a number; False if it is as high already."""
        with self._lock:
            if int(self._values.get(name, "0")) >= number:
                return False
            self._values[name] = str(number)
            return True

    def now(self, names: Sequence[str]) -> dict[str, str | None]:
        """The values; None for those that are not there."""
        with self._lock:
            return {name: self._values.get(name) for name in names}

    def once_there(self, names: Sequence[str]) -> concurrent.futures.Future[dict[str, str | None]]:
        """The values, once all are there."""
        future: concurrent.futures.Future[dict[str, str | None]] = concurrent.futures.Future()
        with self._lock:
            self._waiting.append((names, future))
            self._tell()
        return future

    def _tell(self) -> None:
        still = []
        for names, future in self._waiting:
            if future.cancelled():
                continue
            if all(name in self._values for name in names):
                if future.set_running_or_notify_cancel():
                    future.set_result({name: self._values[name] for name in names})
            else:
                still.append((names, future))
        self._waiting = still
