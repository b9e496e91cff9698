"""Messages between the processes of a job: JSON in frames, from those who know the job's secret and nobody else.

Both ends prove that they know the secret before the first message, over a nonce of each, so that a proof that was
overheard is of no use. Every frame then carries a code over its number and direction, by a key of this connection
alone: it cannot be forged, repeated or left out. Nothing is encrypted, and nothing is unpickled. (HMAC: RFC 2104.)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from typing import Any

__all__ = [
    "GREETING_BYTES",
    "HEAD_BYTES",
    "HELLO_BYTES",
    "PROOF_BYTES",
    "Malformed",
    "Session",
    "answer_greeting",
    "answer_hello",
    "greet",
]

_MAGIC = b"RRM1"
_NONCE_BYTES, PROOF_BYTES, _TAG_BYTES = 16, 32, 16
_HEAD = struct.Struct(f"<I{_TAG_BYTES}s")
GREETING_BYTES = len(_MAGIC) + _NONCE_BYTES
HELLO_BYTES = len(_MAGIC) + 1 + _NONCE_BYTES + PROOF_BYTES
HEAD_BYTES = _HEAD.size
_LARGEST = 1 << 20  # bytes of a message
_BY_SECRET, _BY_USER = b"S", b"U"


class Malformed(ConnectionError):
    """What came is not from a process of the job, or no message."""


class Session:
    """One connection after its greetings; `listens` tells the two ends apart. `trusted` is whether the other end knows
    the secret: it may otherwise only be another process of this user on this host."""

    def __init__(self, secret: bytes, nonces: bytes, listens: bool, trusted: bool) -> None:
        self.trusted = trusted
        here, there = (b"listener", b"caller") if listens else (b"caller", b"listener")
        self._out, self._in = (_code(secret, b"key of the " + end, nonces) for end in (here, there))
        self._sent = self._received = 0

    def seal(self, message: dict[str, Any]) -> bytes:
        """The next frame. Raises `ValueError` if the message is too long."""
        payload = json.dumps(message).encode()
        if len(payload) > _LARGEST:
            raise ValueError(f"expected a message of up to {_LARGEST} bytes, got {len(payload)}")
        self._sent += 1
        return _HEAD.pack(len(payload), self._tag(self._out, self._sent, payload)) + payload

    @staticmethod
    def length(head: bytes) -> int:
        """How many bytes follow a frame's head. Raises `Malformed`."""
        length, _ = _HEAD.unpack(head)
        if length > _LARGEST:
            raise Malformed(f"a frame of {length} bytes")
        return int(length)

    def opened(self, head: bytes, payload: bytes) -> dict[str, Any]:
        """The message in a frame. Raises `Malformed`."""
        _, tag = _HEAD.unpack(head)
        self._received += 1
        if not hmac.compare_digest(tag, self._tag(self._in, self._received, payload)):
            raise Malformed("a frame that the other end did not send next")
        try:
            message = json.loads(payload)
        except (ValueError, RecursionError) as failure:
            raise Malformed(f"no JSON: {failure}") from None
        if not isinstance(message, dict):
            raise Malformed(f"expected an object, got {type(message).__name__}")
        return message

    @staticmethod
    def _tag(key: bytes, number: int, payload: bytes) -> bytes:
        return _code(key, number.to_bytes(8, "little"), payload)[:_TAG_BYTES]


def greet() -> bytes:
    """What the end that listens sends first."""
    return _MAGIC + secrets.token_bytes(_NONCE_BYTES)


def answer_greeting(secret: bytes | None, greeting: bytes) -> tuple[bytes, bytes, Session]:
    """What the end that calls answers, the proof that it then expects, and the session after that. Without a secret it
    is known by its user. Raises `Malformed`."""
    if not greeting.startswith(_MAGIC):
        raise Malformed(f"expected a process of a job, got {greeting[:8]!r}")
    nonces = greeting[len(_MAGIC) :] + secrets.token_bytes(_NONCE_BYTES)
    key, mode = (b"", _BY_USER) if secret is None else (secret, _BY_SECRET)
    hello = _MAGIC + mode + nonces[_NONCE_BYTES:] + _code(key, b"caller", nonces)
    return hello, _code(key, b"listener", nonces), Session(key, nonces, listens=False, trusted=True)


def answer_hello(secret: bytes, greeting: bytes, hello: bytes, same_user: bool) -> tuple[bytes, Session]:
    """What the end that listens answers, and the session after that. `same_user`: the kernel says that the other end is
    a process of this user on this host. Raises `Malformed` unless it knows the secret, or is one and claims no more."""
    magic, mode = hello[: len(_MAGIC)], hello[len(_MAGIC) : len(_MAGIC) + 1]
    nonces = greeting[len(_MAGIC) :] + hello[len(_MAGIC) + 1 : -PROOF_BYTES]
    trusted = mode == _BY_SECRET
    key = secret if trusted else b""
    if magic != _MAGIC or not (trusted or (mode == _BY_USER and same_user)):
        raise Malformed("no greeting of a process of this job")
    if not hmac.compare_digest(hello[-PROOF_BYTES:], _code(key, b"caller", nonces)):
        raise Malformed("the other end does not know the job's secret")
    return _code(key, b"listener", nonces), Session(key, nonces, listens=True, trusted=trusted)


def _code(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), hashlib.sha256)
