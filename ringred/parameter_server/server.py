"""A server: one thread that listens on one address, hosts a shard (and the coordinator), and hands messages to them.

ZeroMQ's own threads move the bytes. What the machines decide is in `coordinator.py` and `shard.py`; here are sockets,
clocks and processes: who may talk, who has died, what has to be said again.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import zmq
from torch import Tensor

from ringred.errors import TransportUnavailable
from ringred.parameter_server import messages as m
from ringred.parameter_server.coordinator import Coordinator, Order
from ringred.parameter_server.keys import Keys
from ringred.parameter_server.shard import Answer, Frame, Memory, Shard
from ringred.parameter_server.shared import Area, SharedMemory, map_window, place
from ringred.transports.windows import Window

__all__ = ["SILENCE", "Server", "bytes_of", "secured"]

_LARGEST = 1 << 34  # bytes of one frame; a longer one closes its connection
_AGAIN = 2.0  # seconds after which an order that was not answered is given again
SILENCE = 15.0  # seconds after which a worker of another place counts as gone
_TICK = 0.5
_LINGER = 1000  # ms for the last answers to leave
_ORDERING = b"coordinator"  # the name under which the coordinator's server calls the others


class _Known(NamedTuple):
    """A worker that met this server: its process, if it is of this place, as a descriptor that ends with it."""

    worker: int
    life: int
    process: int


class Server:
    """Hosts shard `number` of `shards`, and server 0 the `coordinator` too; serves on a thread from `start` on.

    `listen` is a ZeroMQ address, `tcp://HOST:*` for any free port, or None for one that this host's processes reach.
    Without `keys` anybody who reaches the address may talk to it: only for addresses of this host.
    """

    def __init__(
        self,
        number: int,
        shards: int,
        *,
        coordinator: Coordinator | None = None,
        listen: str | None = None,
        keys: Keys | None = None,
        shared: bool = True,
    ) -> None:
        self.number, self.shards, self.keys = number, shards, keys
        self.place = place() if shared else ""
        self.area = Area() if self.place else None
        memory = SharedMemory(self.area) if self.area is not None else Memory()
        self.shard = Shard(number, memory, self._in_window)
        self.coordinator = coordinator
        self.refused = 0
        self._windows: dict[bytes, Window] = {}
        self._known: dict[bytes, _Known] = {}
        self._heard: dict[bytes, float] = {}
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self._given: dict[tuple[int, int], float] = {}
        self._context = zmq.Context(1)
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._door = _Door(self._context, keys) if keys is not None else None
        self._router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._router.set(zmq.MAXMSGSIZE, _LARGEST)
        self._router.set(zmq.LINGER, _LINGER)
        self._router.set(zmq.ROUTER_HANDOVER, 1)  # a worker that comes back takes its place
        if keys is not None:
            self._router.set(zmq.CURVE_SERVER, 1)
            self._router.set(zmq.CURVE_SECRETKEY, keys.server_secret.encode())
            self._router.set(zmq.ZAP_DOMAIN, b"ringred")
        self.address = self._bind(listen or f"ipc://@ringred-{secrets.token_hex(16)}")
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        if self._door is not None:
            self._poller.register(self._door.socket, zmq.POLLIN)
        self._wake, self._woken = socket.socketpair()
        self._poller.register(self._woken.fileno(), zmq.POLLIN)
        self._thread = threading.Thread(target=self._serve, name=f"ringred-server-{number}", daemon=True)
        self._stop = False
        self._because = ""
        self._ended = False
        self._abandoned = math.inf

    def _bind(self, listen: str) -> str:
        reason = ""
        if self.keys is None and not _of_this_host(listen):
            reason = "other hosts reach it, and there are no keys to tell who calls"
        else:
            try:
                self._router.bind(listen)
            except zmq.ZMQError as failure:
                reason = str(failure)
        if reason:
            self._context.destroy(0)
            if self.area is not None:
                self.area.close()
            raise TransportUnavailable(f"server {self.number} cannot listen on {listen}: {reason}")
        return self._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def start(self, addresses: Sequence[str]) -> None:
        """Serves, and gives orders to the other servers at `addresses`, by number."""
        if self.coordinator is not None:
            for number, address in enumerate(addresses):
                if number != self.number:
                    link = secured(self._context.socket(zmq.DEALER), self.keys)
                    link.set(zmq.ROUTING_ID, _ORDERING)
                    link.connect(address)
                    self._links[number] = link
                    self._poller.register(link, zmq.POLLIN)
        self._thread.start()

    def done(self, patience: float) -> bool:
        """Whether nobody needs this server any more: all workers have left, or died and did not come back within
        `patience` seconds. A thread that died ends in its exception."""
        if self.coordinator is None or self._because:
            return self._ended or bool(self._because)
        if not self.coordinator.abandoned:
            self._abandoned = time.monotonic()
        return self.coordinator.finished or time.monotonic() - self._abandoned > patience

    def close(self, because: str = "") -> None:
        """Ends the thread, and everything that this server holds. If there is a reason, workers are told it."""
        self._because = because
        self._stop = True
        self._wake.send(b".")
        if self._thread.is_alive():
            self._thread.join()
        for known in self._known.values():
            if known.process >= 0:
                os.close(known.process)
        self._known.clear()
        self._windows.clear()
        for link in (self._router, *self._links.values(), *(() if self._door is None else (self._door.socket,))):
            link.close()
        self._context.term()
        self._wake.close()
        self._woken.close()
        if self.area is not None:
            self.area.close()

    # ------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        try:
            self._loop()
        except BaseException as failure:
            self._because = f"raised {type(failure).__name__}: {failure}"
            raise
        finally:
            for number, link in self._links.items():
                with contextlib.suppress(zmq.Again):
                    link.send(m.pack(1 + number, 0, m.End()), zmq.NOBLOCK)
            if self._because:
                text = m.Failed("PeerFailed", f"server {self.number} at {self.address} is gone: it {self._because}")
                for peer in self._known:
                    self._send(Answer(peer, 0, text))

    def _loop(self) -> None:
        ticked = time.monotonic()
        while not self._stop:
            ready = dict(self._poller.poll(int(_TICK * 1000)))
            if self._door is not None and self._door.socket in ready:
                self._door.answer()
            if self._router in ready:
                self._take_all()
            for number, link in self._links.items():
                if link in ready:
                    self._take_answers(number, link)
            for peer in [peer for peer, known in self._known.items() if known.process in ready]:
                self._gone(peer, "its process ended")
            if time.monotonic() - ticked > _TICK:
                ticked = time.monotonic()
                self._tick(ticked)

    def _take_all(self) -> None:
        for _ in range(64):  # then the others have their turn
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._take(peer.bytes, frames)

    def _take(self, peer: bytes, frames: list[zmq.Frame]) -> None:
        try:
            machine, request, message = m.unpack(frames[0].buffer if frames else b"")
        except m.Malformed:
            self.refused += 1
            return
        if peer in self._heard:
            self._heard[peer] = time.monotonic()
        body: list[Frame] = [frame.buffer for frame in frames[1:]]
        if isinstance(message, m.Meet):
            self._meet(peer, request, message)
        elif isinstance(message, (m.Apply, m.Discard, m.End)) and peer != _ORDERING:
            self.refused += 1
        elif isinstance(message, m.End):
            self._ended = True
        elif isinstance(message, m.Beat):
            self._send(Answer(peer, request, m.Done()))
        elif machine == m.COORDINATOR and self.coordinator is not None:
            self._deliver(self.coordinator.handle(peer, request, message, body))
        elif machine == 1 + self.number:
            self._deliver(self.shard.handle(peer, request, message, body))
        else:
            text = f"server {self.number} has no machine {machine} of {1 + self.shards}"
            self._send(Answer(peer, request, m.Failed("PolicyError", text)))

    def _deliver(self, results: Sequence[Answer | Order]) -> None:
        """Sends answers to workers and orders to shards. Workers hear first: they have some way to go until they need
        what the shards then do."""
        queue = deque(sorted(results, key=lambda result: isinstance(result, Order)))
        while queue:
            result = queue.popleft()
            if isinstance(result, Answer):
                self._send(result)
            elif result.shard == self.number:
                assert self.coordinator is not None
                for answer in self.shard.handle(b"", 0, result.message, ()):
                    if answer.peer:
                        queue.append(answer)
                    else:
                        self._check_obeyed(result, answer.message)
                self.coordinator.answered(result.shard, result.number)
            else:
                self._give(result)

    def _check_obeyed(self, order: Order, answer: Any) -> None:
        if isinstance(answer, m.Failed):
            raise RuntimeError(f"shard {order.shard} cannot do {type(order.message).__name__}: {answer.text}")

    def _send(self, answer: Answer) -> None:
        frames: list[Any] = [answer.peer, m.pack(0, answer.request, answer.message)]
        frames += [bytes_of(frame) for frame in answer.frames]
        with contextlib.suppress(zmq.Again, zmq.ZMQError):  # the worker is gone, or asks again
            self._router.send_multipart(frames, zmq.NOBLOCK, copy=len(frames) <= 2)

    # ------------------------------------------------------------------ orders to other servers' shards

    def _give(self, order: Order) -> None:
        self._given[order.shard, order.number] = time.monotonic()
        with contextlib.suppress(zmq.Again):
            self._links[order.shard].send(m.pack(1 + order.shard, order.number, order.message), zmq.NOBLOCK)

    def _take_answers(self, number: int, link: zmq.Socket[bytes]) -> None:
        assert self.coordinator is not None
        with contextlib.suppress(zmq.Again):
            while True:
                _, request, message = m.unpack(link.recv(zmq.NOBLOCK))
                order = self.coordinator.orders[number].get(request)
                if order is not None:
                    self._check_obeyed(order, message)
                self.coordinator.answered(number, request)
                self._given.pop((number, request), None)

    # ------------------------------------------------------------------ workers that come and go

    def _meet(self, peer: bytes, request: int, message: m.Meet) -> None:
        """Shares memory with a worker of the same place, and watches its process."""
        descriptor, head, process = -1, -1, -1
        near = bool(self.place) and message.place == self.place and self.area is not None
        if near:
            with contextlib.suppress(OSError):
                process = os.pidfd_open(message.pid)
            with contextlib.suppress(OSError):
                self._windows[peer] = map_window(message.pid, message.descriptor)
                assert self.area is not None
                descriptor = self.area.descriptor
                memory = self.shard.memory
                head = memory.head if isinstance(memory, SharedMemory) else -1
        self._forget(peer)
        if message.pid == os.getpid() and process >= 0:  # a thread of this process ends by itself
            os.close(process)
            process = -1
        self._known[peer] = _Known(message.worker, message.life, process)
        if process >= 0:
            self._poller.register(process, select.POLLIN)
        elif not near:
            self._heard[peer] = time.monotonic()
        self._send(Answer(peer, request, m.Met(os.getpid() if near else 0, descriptor, head, self.shards)))

    def _forget(self, peer: bytes) -> None:
        known = self._known.pop(peer, None)
        if known is not None and known.process >= 0:
            self._poller.unregister(known.process)
            os.close(known.process)
        self._heard.pop(peer, None)

    def _gone(self, peer: bytes, how: str) -> None:
        known = self._known[peer]
        self._forget(peer)
        self._windows.pop(peer, None)
        if self.coordinator is not None:
            self._deliver(self.coordinator.left(known.worker, known.life, how))

    def _tick(self, now: float) -> None:
        for peer, heard in list(self._heard.items()):
            if now - heard > SILENCE:
                self._gone(peer, f"was not heard of for {SILENCE:.0f} s")
        if self.coordinator is None:
            return
        for (shard, number), given in list(self._given.items()):
            order = self.coordinator.orders[shard].get(number)
            if order is None:
                del self._given[shard, number]
            elif now - given > _AGAIN:
                self._give(order)

    def _in_window(self, peer: bytes, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        window = self._windows.get(peer)
        if window is None or not 0 <= offset <= window.nbytes - nbytes or offset % dtype.itemsize:
            raise ValueError(f"{nbytes} bytes at {offset} are not in a window of this worker")
        return window.view(offset, nbytes, dtype) if nbytes else torch.empty(0, dtype=dtype)


class _Door:
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
    link.set(zmq.LINGER, _LINGER)
    link.set(zmq.MAXMSGSIZE, _LARGEST)
    if keys is not None:
        link.set(zmq.CURVE_SERVERKEY, keys.server_public.encode())
        link.set(zmq.CURVE_PUBLICKEY, keys.worker_public.encode())
        link.set(zmq.CURVE_SECRETKEY, keys.worker_secret.encode())
    return link


def bytes_of(frame: Frame) -> Any:
    """The memory of a tensor as bytes, without a copy."""
    if isinstance(frame, Tensor):
        flat: Any = frame.detach().reshape(-1).view(torch.uint8).numpy()
        return memoryview(flat) if frame.numel() else b""
    return frame


def _of_this_host(address: str) -> bool:
    if address.startswith(("ipc://", "inproc://")):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
