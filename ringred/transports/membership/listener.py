"""Listens for other processes of the job, on a thread of its own that all listeners of this process share.

It answers while the program computes, waits in a collective or is stuck. Who does not prove within seconds that it
belongs to the job is cut off, and there is a limit to how many may try at once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from ringred.errors import TransportUnavailable
from ringred.transports.credentials import credentials_of
from ringred.transports.membership.wire import HEAD_BYTES, HELLO_BYTES, Malformed, Session, answer_hello, greet

__all__ = ["Answer", "Listener", "end_thread"]

Held: TypeAlias = "concurrent.futures.Future[dict[str, Any]]"
Answer: TypeAlias = Callable[[dict[str, Any], bool], "dict[str, Any] | Held"]
"""The answer to a message of a process that knows the secret (or else of one of the same user), or what will have it.
It is called on the listener's thread, and never blocks. A future is cancelled when who waits for it goes."""

_STRANGERS = 256  # connections at once whose other end has not proved anything yet
_PATIENCE = 5.0  # seconds for it
_READ_BYTES = 1 << 16


class Listener:
    """Answers messages at the Unix socket `name`, and at a `port` of the address `interface` if there is one; 0 is any.

    Raises `TransportUnavailable`."""

    def __init__(self, secret: bytes, answer: Answer, name: str, interface: str | None, port: int) -> None:
        self.secret, self.answer = secret, answer
        self.doors: list[socket.socket] = []
        self.guests: set[_Guest] = set()
        self.strangers: dict[_Guest, None] = {}  # those who have not proved anything yet, by age
        self.port = 0
        try:
            self._open(socket.AF_UNIX, f"\0{name}")
            if interface is not None:
                self._open(socket.AF_INET, (interface, port))
                self.port = int(self.doors[-1].getsockname()[1])
        except OSError as failure:
            for door in self.doors:
                door.close()
            raise TransportUnavailable(f"no socket to listen at {interface or name}: {failure}") from None
        _thread().do(self._begin)

    def _open(self, family: int, address: Any) -> None:
        door = socket.socket(family, socket.SOCK_STREAM)
        self.doors.append(door)
        door.bind(address)
        door.listen(4096)
        door.setblocking(False)

    def _begin(self, thread: _Thread) -> None:
        thread.listeners.add(self)
        for door in self.doors:
            thread.watch(door, lambda events, door=door: self._accept(thread, door))  # type: ignore[misc]

    def _accept(self, thread: _Thread, door: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = door.accept()
                if len(self.strangers) >= _STRANGERS:  # the oldest makes room
                    next(iter(self.strangers)).end()
                guest = _Guest(thread, self, connection)
                self.guests.add(guest)
                self.strangers[guest] = None

    def close(self) -> None:
        """Listens no more, and cuts off who waits."""
        _thread().do(self._end)

    def _end(self, thread: _Thread) -> None:
        thread.listeners.discard(self)
        for guest in list(self.guests):
            guest.end()
        for door in self.doors:
            thread.forget(door)
            door.close()
        self.doors.clear()


class _Guest:
    """One connection to a listener. All of it happens on the listeners' thread."""

    def __init__(self, thread: _Thread, listener: Listener, connection: socket.socket) -> None:
        self._thread, self._listener, self._socket = thread, listener, connection
        self.session: Session | None = None
        self.until = time.monotonic() + _PATIENCE  # by when it must have proved something
        self._greeting = greet()
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._held: Held | None = None
        connection.setblocking(False)
        thread.watch(connection, self._ready)
        self._say(self._greeting)

    def _ready(self, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._say(b"")
            if events & selectors.EVENT_READ:
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    raise Malformed("it has gone")
                self._incoming += data
                self._hear()
        except BlockingIOError:
            pass
        except Exception:  # it has gone, or is not of this job: whatever it did, others are answered
            self.end()

    def _hear(self) -> None:
        if self._held is not None:
            raise Malformed("it did not wait for the answer")
        if self.session is None:
            if len(self._incoming) < HELLO_BYTES:
                return
            user = credentials_of(self._socket).user if self._socket.family == socket.AF_UNIX else -1
            hello, same_user = self._taken(HELLO_BYTES), user in (os.geteuid(), 0)
            proof, self.session = answer_hello(self._listener.secret, self._greeting, hello, same_user)
            self._listener.strangers.pop(self, None)
            self._say(proof)
        while self._held is None and len(self._incoming) >= HEAD_BYTES:
            length = Session.length(bytes(self._incoming[:HEAD_BYTES]))
            if len(self._incoming) < HEAD_BYTES + length:
                return
            head = self._taken(HEAD_BYTES)
            message = self.session.opened(head, self._taken(length))
            self._reply(self._listener.answer(message, self.session.trusted))

    def _taken(self, nbytes: int) -> bytes:
        data = bytes(self._incoming[:nbytes])
        del self._incoming[:nbytes]
        return data

    def _reply(self, answer: dict[str, Any] | Held) -> None:
        assert self.session is not None, "only who has a session asks"
        if isinstance(answer, dict):
            try:
                sealed = self.session.seal(answer)
            except (TypeError, ValueError) as failure:
                sealed = self.session.seal({"refused": f"the answer cannot be sent: {failure}"[:500]})
            self._say(sealed)
            return
        self._held = answer
        answer.add_done_callback(lambda done: self._thread.post(lambda thread: self._give(done)))

    def _give(self, answer: Held) -> None:
        if self._held is not answer or answer.cancelled():
            return
        self._held = None
        try:
            self._reply(answer.result())
            self._hear()
        except Exception:  # as above
            self.end()

    def _say(self, data: bytes) -> None:
        self._outgoing += data
        if self._outgoing:
            with contextlib.suppress(BlockingIOError):
                del self._outgoing[: self._socket.send(self._outgoing)]
        self._thread.watch(self._socket, self._ready, bool(self._outgoing))

    def end(self) -> None:
        """Cuts it off."""
        self._listener.guests.discard(self)
        self._listener.strangers.pop(self, None)
        self._thread.forget(self._socket)
        self._socket.close()
        held, self._held = self._held, None
        if held is not None:
            held.cancel()


# ---------------------------------------------------------------------- the thread of this process


class _Thread:
    """Waits for all sockets of all listeners."""

    def __init__(self) -> None:
        self.listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)
        self._posted: deque[Callable[[_Thread], object]] = deque()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="ringred-listener", daemon=True)
        self._thread.start()

    def post(self, job: Callable[[_Thread], object]) -> None:
        """Has `job` done on this thread, soon."""
        self._posted.append(job)
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes it as well
            os.write(self._wake_writer, b"x")

    def do(self, job: Callable[[_Thread], object]) -> None:
        """Has `job` done on this thread, and returns then."""
        done = threading.Event()

        def then(thread: _Thread) -> None:
            try:
                job(thread)
            finally:
                done.set()

        self.post(then)
        done.wait()

    def watch(self, one: socket.socket, ready: Callable[[int], object], writes: bool = False) -> None:
        """From here on `ready(events)` is called when `one` can be read, or written to if it `writes`."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writes else 0)
        known = self._selector.get_map().get(one.fileno())
        if known is None:
            self._selector.register(one, events, ready)
        elif known.events != events:
            self._selector.modify(one, events, ready)

    def forget(self, one: socket.socket) -> None:
        """It is not called any more for `one`."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(one)

    def _woken(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_reader, 4096):
                pass

    def end(self, limit: float) -> None:
        """Ends the thread, for which it waits at most `limit` seconds."""
        self.post(lambda thread: setattr(thread, "_ended", True))
        self._thread.join(limit)

    def _run(self) -> None:
        while not self._ended:
            limits = [next(iter(one.strangers)).until for one in self.listeners if one.strangers]
            left = max(0.0, min(limits) - time.monotonic()) if limits else None
            for key, events in self._selector.select(left):
                key.data(events)
            while self._posted:
                with contextlib.suppress(OSError, ValueError, KeyError):  # of one connection: others are answered
                    self._posted.popleft()(self)
            now = time.monotonic()
            for guest in [g for one in self.listeners for g in one.strangers if g.until <= now]:
                guest.end()

    def forget_all(self) -> None:
        """In a forked child: closes its copies of the sockets, at which the parent alone listens."""
        self._selector.close()
        for descriptor in (self._wake_reader, self._wake_writer):
            os.close(descriptor)
        for listener in list(self.listeners):
            for one in (*listener.doors, *(guest._socket for guest in listener.guests)):
                one.close()


_starting = threading.Lock()
_shared: _Thread | None = None


def _thread() -> _Thread:
    global _shared
    with _starting:
        if _shared is None:
            _shared = _Thread()
        return _shared


def end_thread(limit: float) -> None:
    """Ends the thread of this process, which waits at most `limit` seconds for that; nobody is answered any more."""
    global _shared
    with _starting:
        before, _shared = _shared, None
    if before is not None:
        before.end(limit)


def _forget_all() -> None:
    global _shared, _starting
    before, _shared, _starting = _shared, None, threading.Lock()
    if before is not None:
        before.forget_all()


os.register_at_fork(after_in_child=_forget_all)
