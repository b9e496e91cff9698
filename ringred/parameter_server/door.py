"""Who may connect to a server: those with the keys of its job, and without keys this host's processes."""

from __future__ import annotations

import contextlib
from typing import Any

import zmq

from ringred.parameter_server.keys import Keys

__all__ = ["Door", "bounded", "of_this_host", "secured"]

_LARGEST = 1 << 34  # bytes of one frame; a longer one closes its connection
_LINGER = 1000  # ms for the last messages to leave


class Door:
    """Answers ZeroMQ's question (ZAP, RFC 27) who may connect: those with the workers' key."""

    def __init__(self, context: zmq.Context[Any], keys: Keys) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind("inproc://zeromq.zap.01")
        self._expected = keys.worker_public_bytes

    def answer(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                version, request, *rest = self.socket.recv_multipart(zmq.NOBLOCK)
                mechanism, credentials = rest[3], rest[4:]
                right = mechanism == b"CURVE" and credentials == [self._expected]
                code, text = (b"200", b"OK") if right else (b"400", b"not a key of this job")
                self.socket.send_multipart([version, request, code, text, b"worker" if right else b"", b""])


def secured(link: zmq.Socket[bytes], keys: Keys | None) -> zmq.Socket[bytes]:
    """`link` as one end of a connection to a server of the job with `keys`."""
    bounded(link)
    if keys is not None:
        link.set(zmq.CURVE_SERVERKEY, keys.server_public.encode())
        link.set(zmq.CURVE_PUBLICKEY, keys.worker_public.encode())
        link.set(zmq.CURVE_SECRETKEY, keys.worker_secret.encode())
    return link


def bounded(link: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """`link`, which takes no frame that is too long, and closes soon after what it still has to send has left."""
    link.set(zmq.LINGER, _LINGER)
    link.set(zmq.MAXMSGSIZE, _LARGEST)
    return link


def of_this_host(address: str) -> bool:
    """Whether only processes of this host reach a ZeroMQ address."""
    if address.startswith(("ipc://", "inproc://")):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
