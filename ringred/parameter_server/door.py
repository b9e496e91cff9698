"""Who may connect to a server: those with the keys of its job, and without keys this host's processes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import zmq

from ringred.errors import TransportUnavailable
from ringred.parameter_server.keys import Keys

__all__ = ["MOST_SOCKETS", "Door", "bounded", "secured"]

MOST_SOCKETS = 4096  # of a context: some for each worker or server

_LARGEST = 1 << 34  # bytes of one frame; a longer one closes its connection
_LINGER = 1000  # ms for the last messages to leave
_IDLE, _EVERY, _MOST = 10, 3, 5  # seconds until a silent connection is tried, seconds between trials, trials


class Door:
    """Where a server listens: `router`, bound to `listen` at `address`. With keys it answers ZeroMQ's question (ZAP,
    RFC 27) who may connect: those with the workers' key. Raises `TransportUnavailable`."""

    def __init__(self, context: zmq.Context[Any], poller: zmq.Poller, keys: Keys | None, listen: str) -> None:
        self._asked: zmq.Socket[bytes] | None = None
        self._expected = b""
        self.router: zmq.Socket[bytes] = bounded(context.socket(zmq.ROUTER))
        self.router.set(zmq.ROUTER_HANDOVER, 1)  # a worker that comes back takes its place
        if keys is not None:
            self._asked = context.socket(zmq.REP)
            self._asked.set(zmq.LINGER, 0)
            self._asked.bind("inproc://zeromq.zap.01")
            self._expected = keys.worker_public_bytes
            self.router.set(zmq.CURVE_SERVER, 1)
            self.router.set(zmq.CURVE_SECRETKEY, keys.server_secret.encode())
            self.router.set(zmq.ZAP_DOMAIN, b"ringred")
            poller.register(self._asked, zmq.POLLIN)
        elif not _of_this_host(listen):
            raise TransportUnavailable(f"{listen}: other hosts reach it, and there are no keys to tell who calls")
        try:
            self.router.bind(listen)
        except zmq.ZMQError as failure:
            raise TransportUnavailable(f"{listen}: {failure}") from None
        self.address = self.router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        poller.register(self.router, zmq.POLLIN)

    def answer(self, ready: Mapping[Any, int]) -> None:
        """Says who may connect."""
        if self._asked is None or self._asked not in ready:
            return
        with contextlib.suppress(zmq.Again):
            while True:
                version, request, *rest = self._asked.recv_multipart(zmq.NOBLOCK)
                mechanism, credentials = rest[3], rest[4:]
                right = mechanism == b"CURVE" and credentials == [self._expected]
                code, text = (b"200", b"OK") if right else (b"400", b"not a key of this job")
                self._asked.send_multipart([version, request, code, text, b"worker" if right else b"", b""])

    def close(self) -> None:
        """Listens no more; what was sent still leaves."""
        self.router.close()
        if self._asked is not None:
            self._asked.close()


def secured(link: zmq.Socket[bytes], keys: Keys | None) -> zmq.Socket[bytes]:
    """`link` as one end of a connection to a server of the job with `keys`. The kernel asks now and then whether the
    other end is still there: that also keeps what is on the way from forgetting the connection."""
    bounded(link)
    link.set(zmq.TCP_KEEPALIVE, 1)
    link.set(zmq.TCP_KEEPALIVE_IDLE, _IDLE)
    link.set(zmq.TCP_KEEPALIVE_INTVL, _EVERY)
    link.set(zmq.TCP_KEEPALIVE_CNT, _MOST)
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


def _of_this_host(address: str) -> bool:
    """Whether only processes of this host reach a ZeroMQ address."""
    if address.startswith(("ipc://", "inproc://")):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
