"""Calls another process of the job: connects, proves who it is, asks, and waits for the answer."""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import time
from typing import Any

from ringred.transports.credentials import credentials_of
from ringred.transports.membership.card import Card
from ringred.transports.membership.wire import (
    GREETING_BYTES,
    HEAD_BYTES,
    PROOF_BYTES,
    Malformed,
    Session,
    answer_greeting,
)

__all__ = ["Connection", "Cut", "Gone", "Refused", "Silent"]


class Gone(ConnectionError):
    """Nobody listens there any more: the process has ended, or left the job."""


class Cut(ConnectionError):
    """The connection ended before the answer: another one tells whether the other end is still there."""


class Refused(ConnectionError):
    """The other end does not do what it was asked for."""


class Silent(TimeoutError):
    """The other end does not answer."""


class Connection:
    """A connection to the process that `card` names, or to a Unix socket of this host by name. `secret` is the job's;
    without one only what any process of this user may ask is answered. Raises `Gone`, `Silent` or `Cut`, and
    `Malformed` where somebody else listens."""

    def __init__(self, card: Card | str, secret: bytes | None, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._card = card
        self._socket = _connected(card, timeout)
        try:
            greeting = self._receive(GREETING_BYTES, deadline)
            hello, proof, self._session = answer_greeting(secret, greeting)
            self._send(hello)
            if not hmac.compare_digest(self._receive(PROOF_BYTES, deadline), proof):
                raise Malformed(f"{self}: does not know the job's secret")
        except BaseException:
            self.close()
            raise

    def ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to `message`. Raises `Silent` if there is none within `timeout` seconds."""
        self.send(message)
        return self.receive(timeout)

    def send(self, message: dict[str, Any]) -> None:
        """Sends what `receive` then gets the answer to."""
        self._send(self._session.seal(message))

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as failure:
            raise Cut(f"{self}: {failure}") from None

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to what was sent; after `Silent` it can be called again, unless a part of it has come."""
        deadline = time.monotonic() + timeout
        head = self._receive(HEAD_BYTES, deadline)
        payload = self._receive(Session.length(head), deadline)
        answer = self._session.opened(head, payload)
        if "refused" in answer:
            raise Refused(f"{self}: {answer['refused']}")
        return answer

    def _receive(self, nbytes: int, deadline: float) -> bytes:
        data = b""
        while len(data) < nbytes:
            left = deadline - time.monotonic()
            if left <= 0:
                if data:
                    self.close()
                raise Silent(f"{self}: no answer")
            self._socket.settimeout(left)
            try:
                part = self._socket.recv(nbytes - len(data))
            except TimeoutError:
                continue
            except OSError as failure:
                raise Cut(f"{self}: {failure}") from None
            if not part:
                raise Cut(f"{self}: closed the connection")
            data += part
        return data

    def __str__(self) -> str:
        return str(self._card)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _connected(card: Card | str, timeout: float) -> socket.socket:
    near = isinstance(card, str) or card.is_here()
    name = card if isinstance(card, str) else card.name
    connection = socket.socket(socket.AF_UNIX if near else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        if near:
            connection.connect(f"\0{name}")
            user = credentials_of(connection).user
            if user not in (os.geteuid(), 0) and os.geteuid() != 0:
                raise Malformed(f"{card}: user {user} listens there, expected {os.geteuid()}")
        else:
            assert isinstance(card, Card), "a name is of this host"
            if not card.port:
                raise Silent(f"{card}: listens on its own host only")
            connection.connect((card.host, card.port))
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except (ConnectionRefusedError, FileNotFoundError) as failure:
        connection.close()
        raise Gone(f"{card}: {failure}") from None
    except Malformed:
        connection.close()
        raise
    except OSError as failure:
        connection.close()
        raise Silent(f"{card}: {failure}") from None
    return connection
