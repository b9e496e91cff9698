"""Keys of a job: who has them may talk to its servers, by CURVE (libsodium), and nobody else is listened to."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from ringred.errors import TransportUnavailable

__all__ = ["Keys", "encryption_rate", "load_keys", "make_keys", "save_keys"]


class Keys(NamedTuple):
    """The key pairs of a job's servers and of its workers, as CURVE's text of 40 characters."""

    server_public: str
    server_secret: str
    worker_public: str
    worker_secret: str

    def __repr__(self) -> str:
        return f"Keys({self.server_public}, ..., {self.worker_public}, ...)"

    def as_text(self) -> str:
        return json.dumps(self)

    @property
    def worker_public_bytes(self) -> bytes:
        """The workers' public key as ZeroMQ tells it to who decides on a connection."""
        decoded: bytes = z85.decode(self.worker_public)  # type: ignore[no-untyped-call]
        return decoded

    @classmethod
    def from_text(cls, text: str) -> Keys:
        """Raises `TransportUnavailable` unless `text` is what `as_text` returned."""
        try:
            keys = cls(*json.loads(text))
            matching = all(
                zmq.curve_public(secret.encode()).decode() == public for public, secret in (keys[:2], keys[2:])
            )
        except (TypeError, ValueError, zmq.ZMQError):
            matching = False
        if not matching:
            raise TransportUnavailable("these are not the keys of a job: expected two pairs that belong together")
        return keys


def make_keys() -> Keys:
    """New ones. Raises `TransportUnavailable` if this build of ZeroMQ has no CURVE."""
    if not zmq.has("curve"):
        raise TransportUnavailable("this ZeroMQ was built without CURVE; pip install pyzmq brings one that has it")
    pairs = [zmq.curve_keypair() for _ in range(2)]
    return Keys(*(half.decode() for pair in pairs for half in pair))


def save_keys(keys: Keys, path: str | Path) -> None:
    """Writes them to a new file that only its owner can read. Raises `FileExistsError`."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(keys.as_text())


def load_keys(path: str | Path) -> Keys:
    """Reads what `save_keys` wrote. Raises `TransportUnavailable` if others may read it, or if it holds no keys."""
    if os.stat(path).st_mode & 0o077:
        raise TransportUnavailable(f"{path}: other users may read these keys; chmod 600 {path}")
    return Keys.from_text(Path(path).read_text())


def encryption_rate(nbytes: int = 4 << 20) -> float:
    """Bytes per second from one thread of this process to another with CURVE. Raises `TransportUnavailable`."""
    keys = make_keys()
    with zmq.Context() as context, context.socket(zmq.PULL) as receiver, context.socket(zmq.PUSH) as sender:
        receiver.curve_server, receiver.curve_secretkey = True, keys.server_secret.encode()
        sender.curve_serverkey = keys.server_public.encode()
        sender.curve_publickey, sender.curve_secretkey = keys.worker_public.encode(), keys.worker_secret.encode()
        port = receiver.bind_to_random_port("tcp://127.0.0.1")
        sender.connect(f"tcp://127.0.0.1:{port}")
        receiver.rcvtimeo, sender.linger = 5000, 0
        try:
            sender.send(b"connected")
            receiver.recv()
            began = time.perf_counter()
            sender.send(bytes(nbytes))
            receiver.recv()
        except zmq.Again:
            raise TransportUnavailable("nothing came over the loopback within 5 s") from None
        return nbytes / (time.perf_counter() - began)
