"""A worker's connections to the servers: requests that are answered, said again, or fail by name at their deadline."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import zmq

from ringred import errors
from ringred.errors import CollectiveTimeout, PeerFailed, RingredError
from ringred.parameter_server import messages as m
from ringred.parameter_server.door import MOST_SOCKETS, secured
from ringred.parameter_server.keys import Keys
from ringred.parameter_server.near import NearLink
from ringred.parameter_server.pulse import BEAT, Far, Pulse
from ringred.parameter_server.shard import Frame, bytes_of
from ringred.parameter_server.shared import WORKERS, Area, SharedValues, map_window, place
from ringred.parameter_server.wire import pack, unpack

__all__ = ["Connection", "Request"]

_AGAIN = 2.0  # seconds after which a request is sent again; then twice as many
_FAR_AGAIN = 20.0  # the same to another place, where much may be on the way, and a lost connection tells what it loses
_SLOWEST = 1 << 20  # bytes a second that are on the way there at least
_SLICE, _LAST_WORDS = 0.02, 1.0


class Request:
    """A message to `machine`, or with `server` to that server itself; `answer` is None until it is answered."""

    def __init__(
        self, machine: int, number: int, message: Any, frames: Sequence[Any], server: int | None = None
    ) -> None:
        self.machine, self.number, self.message, self.server = machine, number, message, server
        self.frames: Sequence[Any] = frames
        self.nbytes = sum(memoryview(frame).nbytes for frame in frames)
        self.began = self.sent = time.monotonic()
        self.patience = _AGAIN
        self.near = False  # whether it went past ZeroMQ
        self.answer: Any = None


class Connection:
    """Worker `worker`, connected to the servers at `addresses`, by number; `told` gets what no request asked for.

    `timeout` are the seconds after which a request that is not answered fails. Raises `PeerFailed` or
    `CollectiveTimeout` if a server is not there. Any thread may ask; one at a time.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        worker: int,
        told: Callable[[Any], None],
        *,
        keys: Keys | None = None,
        timeout: float = 60.0,
        shared: bool = True,
    ) -> None:
        self.worker, self.timeout, self.addresses = worker, timeout, list(addresses)
        self.life = int.from_bytes(os.urandom(7), "little")
        self._name = f"w{worker}/{self.life:x}".encode()
        self._near: dict[int, NearLink] = {}  # by server
        self._told = told
        self._failure: RingredError | None = None
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._open: dict[int, Request] = {}
        self._context = zmq.Context(1)
        self._context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
        self._poller = zmq.Poller()
        self._links: list[zmq.Socket[bytes]] = []
        self._processes: dict[int, int] = {}
        self._ended, self._heard_out = set[int](), set[int]()
        self._backups: dict[int, int] = {}
        self._far: dict[int, Far] = {}  # the servers of other places
        self._keys = keys
        self.area = Area() if shared and worker < WORKERS and place() else None
        self.values: dict[int, SharedValues] = {}
        self._closed = threading.Event()
        self._owner = threading.current_thread()
        for address in addresses:
            link = secured(self._context.socket(zmq.DEALER), keys)
            link.set(zmq.ROUTING_ID, self._name)
            link.connect(address)
            self._poller.register(link, zmq.POLLIN)
            self._links.append(link)
        try:
            self._meet()
        except BaseException:
            self.close()
            raise

    def _meet(self) -> None:
        descriptor = -1 if self.area is None else self.area.descriptor
        here = "" if self.area is None else place()
        meet = m.Meet(self.worker, self.life, os.getpid(), descriptor, here)
        asked = [self.ask(m.COORDINATOR, meet, server=server) for server in range(len(self._links))]
        self.wait(asked)
        for server, request in enumerate(asked):
            met: m.Met = request.answer
            if met.shards != len(self._links):
                raise PeerFailed(
                    f"worker {self.worker}: {self._called(server)} is one of {met.shards} servers, and this worker was "
                    f"given the addresses of {len(self._links)}"
                )
            self._backups[server] = met.backup
            if not met.pid:
                pulse = Pulse(self._context, self._poller, self.addresses[server], self._name, self._keys)
                self._far[server] = Far(pulse, self._links[server])
                self._poller.register(self._far[server].again, zmq.POLLIN)
                continue
            with contextlib.suppress(OSError):
                if met.pid != os.getpid():
                    self._processes[server] = os.pidfd_open(met.pid)
                    self._poller.register(self._processes[server], zmq.POLLIN)
                if met.descriptor >= 0:
                    self.values[server] = SharedValues(map_window(met.pid, met.descriptor), met.head)
            with contextlib.suppress(OSError):
                if met.near:
                    self._near[server] = NearLink(met.near, self._name)
                    self._poller.register(self._near[server].descriptor, zmq.POLLIN)
        if self._far or self._owner is not threading.main_thread():
            # Nothing else would tell that servers of other places live, or that this worker's thread does.
            threading.Thread(target=self._beat, name=f"ringred-beat-{self.worker}", daemon=True).start()

    # ------------------------------------------------------------------ requests

    def ask(
        self,
        machine: int,
        message: Any,
        frames: Sequence[Frame] = (),
        *,
        server: int | None = None,
        answer_bytes: int = 0,
    ) -> Request:
        """Sends `message`; `wait` has its answer, of about so many bytes. The frames must not change until then."""
        with self._lock:
            request = self._opened(machine, message, frames, server, answer_bytes)
            self._send(request)
        return request

    def expect(self, machine: int, message: Any) -> Request:
        """As `ask`, but `message` is only sent if its answer does not come by itself."""
        with self._lock:
            return self._opened(machine, message)

    def _opened(
        self,
        machine: int,
        message: Any,
        frames: Sequence[Frame] = (),
        server: int | None = None,
        answer_bytes: int = 0,
    ) -> Request:
        number = next(self._numbers)
        request = self._open[number] = Request(machine, number, message, list(map(bytes_of, frames)), server)
        request.nbytes += answer_bytes
        request.patience = self._patience(request)
        return request

    def _patience(self, request: Request) -> float:
        """How long its answer may take before it is sent again."""
        if self._asked(request) not in self._far:
            return _AGAIN
        return _FAR_AGAIN + sum(known.nbytes for known in self._open.values()) / _SLOWEST

    def send(self, machine: int, message: Any, *, server: int | None = None) -> None:
        """Sends what is not answered as a request is."""
        with self._lock:
            if not self._closed.is_set():
                self._send(Request(machine, 0, message, (), server))

    def server_of(self, machine: int) -> int:
        """The server that has the machine: its own, or the one with the copy if that is dead."""
        home = max(0, machine - 1)
        backup = self._backups.get(home, -1)
        return backup if home in self._ended and self._copied(home) else home

    def _copied(self, server: int) -> bool:
        """Whether another server, which lives, has a copy of what this one has."""
        return self._backups.get(server, -1) >= 0 and self._backups[server] not in self._ended

    def ask_after(self, others: Iterable[Request], machine: int, message: Any) -> Request:
        """As `ask`; the message comes after `others` to the same server. There are two ways, each of which keeps the
        order."""
        before = list(others)
        if not all(request.near or request.answer is not None for request in before):
            self.wait(before)
        request = self.expect(machine, message)
        with self._lock:
            request.near = self._send_near(request)
        if not request.near:
            self.wait(before)
            with self._lock:
                self._send(request)
        return request

    def _send_near(self, request: Request) -> bool:
        server = self._asked(request)
        frame = pack(request.machine, request.number, request.message)
        return not request.frames and server in self._near and self._near[server].send(frame)

    def _send(self, request: Request, *, near: bool = True) -> None:
        request.near = near and self._send_near(request)
        if request.near:
            return
        parts = [pack(request.machine, request.number, request.message), *request.frames]
        server = self._asked(request)
        try:
            self._links[server].send_multipart(parts, zmq.NOBLOCK, copy=not request.frames)
        except zmq.Again:  # too much is on the way already
            request.patience = _AGAIN

    def wait(self, requests: Iterable[Request], timeout: float | None = None) -> list[Any]:
        """The answers. Raises the exception that one of them is, and `CollectiveTimeout` or `PeerFailed`."""
        asked = list(requests)
        limit = self.timeout if timeout is None else timeout
        began, waited = time.monotonic(), None
        for request in asked:
            while request.answer is None:
                self.poll(0.0 if waited is None else _SLICE, self._asked(request))
                waited = time.monotonic() - began
                if request.answer is None and waited > limit:
                    with self._lock:
                        for given_up in asked:
                            self._open.pop(given_up.number, None)
                    raise CollectiveTimeout(
                        f"worker {self.worker}: {self._called(self._asked(request))} did not answer "
                        f"{type(request.message).__name__} within {waited:.0f} s"
                    )
            if isinstance(request.answer, m.Failed):
                raise exception_of(request.answer, f"worker {self.worker}")
        return [request.answer for request in asked]

    def _asked(self, request: Request) -> int:
        return self.server_of(request.machine) if request.server is None else request.server

    def poll(self, seconds: float, server: int | None = None) -> None:
        """Takes what has come, or comes within `seconds`. Raises `PeerFailed` if `server` has ended, and what a server
        said that ends this worker's work."""
        with self._lock:
            if self._closed.is_set():
                raise RingredError(f"worker {self.worker}: this connection is closed")
            for link, _ in self._poller.poll(int(seconds * 1000)):
                if not isinstance(link, int):
                    if link in self._links:
                        self._take_all(self._links.index(link))
                    else:
                        self._take_far(link)
                elif (ended := self._whose(link, self._processes)) is not None:
                    self._server_ended(ended)
                else:
                    self._take_near(link)
            now = time.monotonic()
            for silent in [server for server, far in self._far.items() if far.pulse.silent]:
                self._server_ended(silent)
            for request in self._open.values():
                if now - request.sent > request.patience:
                    request.sent, request.patience = now, max(2 * request.patience, self._patience(request))
                    self._send(request)
            if server in self._ended - self._heard_out and not self._copied(server):
                self._hear_out(server)
        if self._failure is not None:
            raise self._failure
        if server in self._ended and not self._copied(server):
            how = "its process ended, or it was not heard of"
            raise PeerFailed(f"worker {self.worker}: {self._called(server)} is gone: {how}")

    @staticmethod
    def _whose(descriptor: int, of: Mapping[int, int]) -> int | None:
        return next((server for server, opened in of.items() if opened == descriptor), None)

    def _take_all(self, server: int) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                head, *frames = self._links[server].recv_multipart(zmq.NOBLOCK, copy=False)
                self._take(server, head.buffer, [frame.buffer for frame in frames])
                if server in self._far:
                    self._far[server].pulse.take()

    def _take_far(self, link: zmq.Socket[bytes]) -> None:
        """A server's pulse, or that the connection to it is a new one: what it was asked may be lost with the old."""
        for server, far in self._far.items():
            if link is far.pulse.link:
                far.pulse.take()
            elif link is far.again:
                with contextlib.suppress(zmq.Again):
                    while True:
                        link.recv_multipart(zmq.NOBLOCK)
                for request in self._open.values():
                    if self._asked(request) == server:
                        request.sent = time.monotonic()
                        self._send(request)

    def _take_near(self, descriptor: int) -> None:
        for server, near in list(self._near.items()):
            if near.descriptor == descriptor:
                for frame in near.take():
                    self._take(server, frame, ())
                if near.gone:  # what there is to say goes through ZeroMQ, and the kernel tells whether the server died
                    self._drop_near(server)

    def _drop_near(self, server: int) -> None:
        near = self._near.pop(server, None)
        if near is not None:
            self._poller.unregister(near.descriptor)
            near.close()

    def _take(self, server: int, head: bytes | memoryview, frames: Sequence[Any]) -> None:
        _, number, message = unpack(head)
        request = self._open.pop(number, None)
        if request is not None:
            request.answer, request.frames = message, frames
        elif number == 0 and isinstance(message, m.Failed):
            self._fail(server, message)
        elif number == 0:
            self._told(message)

    def _fail(self, server: int, failed: m.Failed) -> None:
        """A server says that all is over, or that it itself is: then its copy goes on."""
        if failed.error == "PeerFailed" and self._copied(server):
            self._server_ended(server)
        elif self._failure is None or isinstance(self._failure, PeerFailed):  # whoever left says more than that it did
            self._failure = exception_of(failed, f"worker {self.worker}")

    def _server_ended(self, server: int) -> None:
        """What it was asked goes to the server that has its copy, in the same order."""
        if server in self._processes:
            process = self._processes.pop(server)
            self._poller.unregister(process)
            os.close(process)
        if server in self._far:
            self._far.pop(server).close(self._poller)
        self._drop_near(server)
        self._ended.add(server)
        self.values.pop(server, None)
        if self._copied(server):
            for request in self._open.values():
                if request.server is None and max(0, request.machine - 1) == server:
                    request.sent, request.patience = time.monotonic(), self._patience(request)
                    self._send(request, near=False)  # all of them one way, in their order

    def _hear_out(self, server: int) -> None:
        """What it said last may come after the news that it ended."""
        until = time.monotonic() + _LAST_WORDS
        while self._failure is None and time.monotonic() < until:
            self._links[server].poll(int(_SLICE * 1000))
            self._take_all(server)
        self._heard_out.add(server)

    def _called(self, server: int | None) -> str:
        return f"server {server} at {self.addresses[server or 0]}"

    def _beat(self) -> None:
        while not self._closed.wait(BEAT if self._far else 1.0):
            if not self._owner.is_alive():
                self.send(m.COORDINATOR, m.Bye(self.worker, self.life, 0, "its thread ended"))
            with self._lock:
                for far in () if self._closed.is_set() else self._far.values():
                    far.pulse.beat(m.Beat(self.worker, self.life))

    def close(self) -> None:
        """Ends the connections; what was not answered is not waited for."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self.values.clear()
            for process in self._processes.values():
                os.close(process)
            self._processes.clear()
            for server in list(self._near):
                self._drop_near(server)
            self._context.destroy(0)
            if self.area is not None:
                self.area.heap.freeze()  # servers may still look at what was committed
                self.area.close()


def exception_of(failed: m.Failed, who: str) -> RingredError:
    """The exception that a server answered with."""
    kind = getattr(errors, failed.error, RingredError)
    text = failed.text if failed.text.startswith(who) else f"{who}: {failed.text}"
    return kind(text) if issubclass(kind, RingredError) else RingredError(text)
