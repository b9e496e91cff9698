"""The ranks of one host: they find each other, map each other's windows, and notice when one of them dies.

Every rank listens on a Unix socket of the abstract namespace, which has no file, and sends its random name and a
secret to all ranks through the bootstrap (`Gather`). Each pair then connects once; both ends check the peer's
credentials as the kernel reports them, send the peer's secret, and pass the file descriptor of their window. The
connection stays open: when it closes, the peer's process is gone, which is noticed in about a millisecond.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from ringred import native
from ringred.transports import futex
from ringred.transports.base import Gather
from ringred.transports.credentials import credentials_of
from ringred.transports.membership.card import place
from ringred.transports.windows import Heap, Window, adopt, create

__all__ = ["Neighbours", "connect"]

_HELLO = struct.Struct("<32sQ")  # the receiver's secret, the sender's rank
_NOTE = struct.Struct("<32sQ")  # a key, and a number that goes with it
_PATIENCE = 30.0  # seconds for a rank of this host to shake hands
_HEARING = 1.0  # seconds for a stranger to take this rank's greeting
_STRANGERS = 256  # connections at once whose other end has not said anything yet

_live: weakref.WeakSet[Neighbours] = weakref.WeakSet()


class _Transport(Protocol):
    def peer_lost(self, member: int) -> None: ...

    def forget(self) -> None: ...


def connect(gather: Gather, rank: int, compiled: bool = True) -> tuple[Neighbours | None, str | None]:
    """The neighbours of `rank`, or None and the reason. Collective: all ranks of the job call it. `compiled` says
    whether this one can play compiled plans.

    Ranks are neighbours if one kernel runs them for one user, in one network namespace. None if this rank
    has no neighbours, or if the ranks of this host could not all connect to each other.
    """
    reason = futex.unavailable()
    listener, secret, name = None, secrets.token_bytes(32), secrets.token_hex(8)
    if reason is None:
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"\0ringred-{name}")
            listener.listen(4096)
        except OSError as failure:
            reason = f"no Unix socket: {failure}"
    here = "-" if reason is not None else place()
    cards = [card.split(" ") for card in gather(f"{here} {name} {secret.hex()} {native.VERSION * compiled}")]
    members = [peer for peer, card in enumerate(cards) if card[0] == here != "-"]
    found: Neighbours | None = None
    if len(members) > 1 and listener is not None:
        try:
            found = Neighbours(rank, members, all(cards[peer][3] == str(native.VERSION) for peer in members))
            found.meet(listener, {peer: (cards[peer][1], bytes.fromhex(cards[peer][2])) for peer in members})
        except (OSError, MemoryError) as failure:
            reason = str(failure)[:200]
    if listener is not None:
        listener.close()
    verdicts = gather(reason or "met")
    troubles = [f"rank {peer}: {verdicts[peer]}" for peer in members if verdicts[peer] != "met"]
    if troubles or reason is not None:
        if found is not None:
            found.close()
        return None, troubles[0] if troubles else reason
    if found is not None:
        found.watch()
    return found, None


class Neighbours:
    """The connected ranks `members` of one host, one of which is `rank`; all are rank numbers of the whole job.

    `windows` are the windows of all members as this process maps them, and `heap` manages this rank's own. `gone` has
    the reason for each member that is no longer there. When a member goes, `peer_lost` of all transports is called, on
    a thread of this object's own. `compiled`: all members play compiled plans.
    """

    def __init__(self, rank: int, members: list[int], compiled: bool) -> None:
        self.rank, self.members, self.compiled = rank, members, compiled
        self._descriptor, own = create(len(members))
        self.windows: dict[int, Window] = {rank: own}
        self.heap = Heap(own)
        self.gone: dict[int, str] = {}
        self._processes: dict[int, int] = {}
        self._transports: set[_Transport] = set()
        self.forked = False
        self._sockets: dict[int, socket.socket] = {}
        self._notes: dict[tuple[int, bytes], int] = {}
        self._news = threading.Condition()
        self._watcher: threading.Thread | None = None
        self._stop_reader, self._stop_writer = -1, -1
        self._users = 0
        self._retired: list[Callable[[], bool]] = []
        self._closed = False
        _live.add(self)

    # ------------------------------------------------------------------ meeting

    def meet(self, listener: socket.socket, cards: dict[int, tuple[str, bytes]]) -> None:
        """Connects to every member below this rank, and is connected to by those above. Raises `OSError`."""
        deadline = time.monotonic() + _PATIENCE
        for peer in self.members:
            if peer < self.rank:
                self._call(peer, *cards[peer], cards[self.rank][1], deadline)
        above = {peer for peer in self.members if peer > self.rank}
        strangers: dict[int, socket.socket] = {}  # who has not said anything yet, by age
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        try:
            while above:
                missing = ", ".join(map(str, sorted(above)))
                left = _left(deadline, f"ranks {missing} of this host did not connect")
                ready = [descriptor for descriptor, _ in poll.poll(1000 * left)]
                for descriptor in ready:
                    if (connection := strangers.pop(descriptor, None)) is not None:
                        poll.unregister(descriptor)
                        above.discard(self._answer(connection, cards, above))
                if listener.fileno() in ready:  # last: a new connection may get the number of one that was ready
                    self._accept(listener, strangers, poll)
        finally:
            for connection in strangers.values():
                connection.close()
        os.close(self._descriptor)
        self._descriptor = -1

    def _accept(self, listener: socket.socket, strangers: dict[int, socket.socket], poll: select.poll) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as failure:
            if failure.errno not in (errno.EMFILE, errno.ENFILE) or not strangers:
                raise
            connection = None
        if connection is None or len(strangers) >= max(_STRANGERS, 2 * len(self.members)):  # the oldest makes room
            oldest = next(iter(strangers))
            poll.unregister(oldest)
            strangers.pop(oldest).close()
        if connection is None:
            return
        if credentials_of(connection).user != os.geteuid():
            connection.close()
            return
        connection.setblocking(False)  # a greeting is one packet
        strangers[connection.fileno()] = connection
        poll.register(connection, select.POLLIN)

    def _call(self, peer: int, name: str, secret: bytes, own_secret: bytes, deadline: float) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sockets[peer] = connection
        connection.settimeout(_left(deadline, f"rank {peer} of this host did not answer"))
        connection.connect(f"\0ringred-{name}")
        process, user = credentials_of(connection)
        if user != os.geteuid():
            raise OSError(f"rank {peer} listens as user {user}, expected {os.geteuid()}")
        self._introduce(connection, secret)
        _, self.windows[peer] = _hear(connection, own_secret, {peer})
        self._processes[peer] = process

    def _answer(self, connection: socket.socket, cards: dict[int, tuple[str, bytes]], expected: set[int]) -> int:
        """The rank at the other end of `connection`, or −1 if it is not an expected rank, and is cut off."""
        try:
            peer, window = _hear(connection, cards[self.rank][1], expected)
            connection.settimeout(_HEARING)
            self._introduce(connection, cards[peer][1])
        except OSError:
            connection.close()
            return -1
        process = credentials_of(connection).process
        self._sockets[peer], self.windows[peer], self._processes[peer] = connection, window, process
        return peer

    def _introduce(self, connection: socket.socket, secret: bytes) -> None:
        socket.send_fds(connection, [_HELLO.pack(secret, self.rank)], [self._descriptor])

    def cores(self, members: Sequence[int]) -> int:
        """The processor cores that `members` may run on between them: each may be bound to some of its own."""
        found = set(os.sched_getaffinity(0))
        for peer in members:
            # The id of a process that is not visible from here is 0, which returns this process's cores again.
            with contextlib.suppress(OSError):
                found |= os.sched_getaffinity(self._processes.get(peer, 0))
        return len(found)

    # ------------------------------------------------------------------ watching

    def watch(self) -> None:
        """Starts the thread that receives notes of the peers, and notices when one ends."""
        for connection in self._sockets.values():
            connection.setblocking(False)
        self._stop_reader, self._stop_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._watcher = threading.Thread(target=self._watch, name=f"ringred-neighbours-{self.rank}", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        poll = select.poll()
        ranks = {connection.fileno(): peer for peer, connection in self._sockets.items()}
        heard = dict.fromkeys(ranks, b"")
        for descriptor in (*ranks, self._stop_reader):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._stop_reader:
                    return
                peer = ranks[descriptor]
                try:
                    data = self._sockets[peer].recv(4096)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    poll.unregister(descriptor)
                    self._lose(peer)
                    continue
                data = heard[descriptor] + data
                whole = len(data) // _NOTE.size * _NOTE.size
                heard[descriptor] = data[whole:]
                with self._news:
                    for key, number in _NOTE.iter_unpack(data[:whole]):
                        self._notes[peer, key] = number
                    self._news.notify_all()

    def _lose(self, peer: int) -> None:
        with self._news:
            self.gone[peer] = "its process ended, or it closed its communicator"
            self._news.notify_all()
            for transport in self._transports:
                transport.peer_lost(peer)

    def has_gone(self, peer: int, patience: float) -> bool:
        """Whether a peer is gone, which is noticed a moment after it happened: within `patience` seconds."""
        with self._news:
            return self._news.wait_for(lambda: peer in self.gone, patience)

    # ------------------------------------------------------------------ notes

    def exchange(self, members: list[int], key: str, number: int, timeout: float) -> dict[int, int]:
        """The numbers that all of `members` give for `key`. Collective among them. Raises `OSError`."""
        digest = hashlib.blake2b(key.encode(), digest_size=32).digest()
        numbers = {self.rank: number}
        for peer in members:
            if peer != self.rank:
                self._sockets[peer].sendall(_NOTE.pack(digest, number))
        deadline = time.monotonic() + timeout
        with self._news:
            for peer in members:
                while peer != self.rank and peer not in numbers:
                    if (peer, digest) in self._notes:
                        numbers[peer] = self._notes.pop((peer, digest))
                        continue
                    if peer in self.gone:
                        raise OSError(f"rank {peer} is gone ({self.gone[peer]})")
                    self._news.wait(_left(deadline, f"rank {peer} did not come to {key!r}"))
        return numbers

    # ------------------------------------------------------------------ ending

    def retire(self, free: Callable[[], bool]) -> None:
        """Keeps the function `free` of a closed transport until it returns True: the memory was freed."""
        with self._news:
            self._retired.append(free)

    def reap(self) -> None:
        """Calls `free` of each closed transport again, and forgets those that returned True."""
        with self._news:
            asked, self._retired = self._retired, []
        try:
            while asked:
                if not asked[-1]():
                    self.retire(asked[-1])
                asked.pop()
        finally:
            for free in asked:
                self.retire(free)

    def hold(self, transport: _Transport) -> None:
        """Registers `transport` as a user; it is told of lost peers."""
        with self._news:
            self._users += 1
            self._transports.add(transport)

    def let_forget(self, transport: _Transport) -> None:
        """`transport` is not told of lost peers any more; when this returns, no `peer_lost` call of it is running."""
        with self._news:
            self._transports.discard(transport)

    def let_go(self) -> None:
        """Removes one user; closes if it was the last."""
        with self._news:  # other threads let go of theirs
            self._users -= 1
            last = not self._users
        if last:
            self.close()

    def close(self) -> None:
        """Ends the connections and the thread. The windows stay mapped while a tensor lies in them."""
        if self._closed:
            return
        self._closed = True
        if self._watcher is not None:
            os.write(self._stop_writer, b"x")
            self._watcher.join()
            os.close(self._stop_reader)
            os.close(self._stop_writer)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        for connection in self._sockets.values():
            connection.close()

    def forget(self) -> None:
        """In a forked child: closes its copies of the connections, which must end with the parent, the real rank."""
        self.forked = self._closed = True
        for transport in self._transports:
            transport.forget()
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):
                connection.close()


def _hear(connection: socket.socket, secret: bytes, expected: set[int]) -> tuple[int, Window]:
    """Receives the rank and window of the other end. Raises `OSError`, also if it does not know this rank's `secret`
    or is no expected rank."""
    data, descriptors, _, _ = socket.recv_fds(connection, _HELLO.size, 1)
    try:
        if len(data) != _HELLO.size or len(descriptors) != 1:
            raise OSError("a greeting of another kind")
        token, rank = _HELLO.unpack(data)
        if not hmac.compare_digest(token, secret) or rank not in expected:
            raise OSError("who is there does not know this rank's secret, or is another rank")
        return rank, adopt(descriptors[0])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _left(deadline: float, otherwise: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise OSError(otherwise)
    return left


def _forget_all() -> None:
    for neighbours in list(_live):
        neighbours.forget()


os.register_at_fork(after_in_child=_forget_all)
