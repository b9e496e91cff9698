"""A torch store on a board that a member of the job keeps (`membership.board`): Gloo connects by it with a secret, and
without a server that anybody may write to."""

from __future__ import annotations

import base64
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as _distributed

from ringred.errors import PeerFailed
from ringred.transports.membership.caller import Connection, Cut, Gone, Silent
from ringred.transports.membership.card import Card
from ringred.transports.membership.wire import Malformed

dist: Any = _distributed

__all__ = ["BoardStore"]

_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 1.0


class BoardStore(dist.Store):  # type: ignore[misc]
    """The board `name` of the member `keeper`. Waits for values for `timeout` seconds by itself; raises
    `torch.distributed.DistStoreError` as torch's stores do, also where the keeper is gone. While it waits, `check` is
    called every second, and may raise."""

    def __init__(
        self, keeper: Card, secret: bytes, name: str, timeout: float, check: Callable[[], None] | None = None
    ) -> None:
        super().__init__()
        self._keeper, self._secret, self._name, self._seconds = keeper, secret, name, timeout
        self._check = check
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._hangs_up: Callable[[], object]  # torch's stores have no end but that of the object

    def _ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = Connection(self._keeper, self._secret, _CONNECT_SECONDS)
                    self._hangs_up = closes = weakref.finalize(self, self._connection.close)
                    closes.atexit = False  # somebody may be waiting for an answer
                self._connection.send({"do": "board", "board": self._name, **message})
                return self._received(self._connection, time.monotonic() + timeout)
            except (Gone, Cut, Silent, Malformed, PeerFailed) as failure:
                if self._connection is not None:
                    self._hangs_up()  # a late answer would be taken for the next one's
                    self._connection = None
                raise dist.DistStoreError(f"board {self._name}: {failure}") from None

    def _received(self, connection: Connection, deadline: float) -> dict[str, Any]:
        while True:
            try:
                return connection.receive(max(0.0, min(_LOOK_SECONDS, deadline - time.monotonic())))
            except Silent:
                if time.monotonic() >= deadline:
                    raise
                if self._check is not None:
                    self._check()

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._ask({"put": {key: base64.b64encode(data).decode()}}, self._seconds)

    def get(self, key: str) -> bytes:
        text = self._ask({"wait": [key]}, self._seconds)[key]
        return base64.b64decode(text)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        seconds = self._seconds if timeout is None else timeout.total_seconds()
        self._ask({"wait": list(keys)}, seconds)

    def check(self, keys: Sequence[str]) -> bool:
        found = self._ask({"look": list(keys)}, self._seconds)
        return all(found[key] is not None for key in keys)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask({"add": key, "number": amount}, self._seconds)["total"])

    def clone(self) -> BoardStore:
        """Another connection to the same board: a wait on one does not hold up the other."""
        return BoardStore(self._keeper, self._secret, self._name, self._seconds, self._check)
