"""Transport between ranks of one host, which access each other's memory.

Each rank has a window that all map (`windows`). In it, for every peer, lies a ring of descriptors that this rank
writes and the peer reads: the contract of a message, its length, where it lies, and its number, which is written
last and says that the rest is there. A message is read in place (a tensor in the sender's window), or from a slot into
which its sender copied it, or its sender has put it into the receiver's window. The receiver publishes the number of
the last message that it has finished with, which frees slots and descriptors.

Why this needs no lock, and on x86-64 one fence only: docs/design/shared-memory.md.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringred.errors import TransportUnavailable
from ringred.transports import futex
from ringred.transports.base import SETTLING_SECONDS, UNSETTLED_SECONDS, Counters, Fault, FaultKind
from ringred.transports.futex import fence, order
from ringred.transports.links import (
    ACKED,
    ALARM,
    CLOSED,
    FORCED,
    FORKED,
    GONE,
    LEFT,
    PART_BYTES,
    SEGMENT_BYTES,
    SENT,
    SETTLES,
    SLEEPING,
    Layout,
    Link,
    Receive,
    Send,
    State,
)
from ringred.transports.neighbours import Neighbours
from ringred.transports.planes import HostPlane, Plane
from ringred.transports.shm_player import ShmPlayer
from ringred.transports.shm_receiving import Receiver
from ringred.transports.shm_reports import Reports
from ringred.transports.shm_sending import SPIN_NS, Sender, gives_way_ns

if TYPE_CHECKING:
    from ringred.transports.cuda.driver import Driver, Event
    from ringred.transports.cuda.memory import DeviceMemory
    from ringred.transports.cuda.plane import DevicePlane

__all__ = ["ShmTransport"]

_LONGEST_SLEEP = 1.0  # seconds; it matters only if a peer dies between its write and waking this rank
_SHORT_SLEEP = 0.0005  # seconds, if another transport must make progress meanwhile


class ShmTransport:
    """Connects the ranks `members` of `neighbours`, numbered in that order or, if given, by `names`.

    With `device`, messages are of memory that streams of that device move. Every member constructs it at the same point
    of the program, with the same `key`. Raises `TransportUnavailable`.
    """

    windows = buffers = True
    depth = 1

    def __init__(
        self,
        neighbours: Neighbours,
        members: Sequence[int],
        key: str,
        timeout: float,
        names: Sequence[int] | None = None,
        size: int | None = None,
        device: DeviceMemory | None = None,
    ) -> None:
        names = list(range(len(members))) if names is None else list(names)
        own = list(members).index(neighbours.rank)
        self.rank, self.size = names[own], len(members) if size is None else size
        self._froze = self._closed = False
        self._neighbours, self._timeout, self._device = neighbours, timeout, device
        self._heap, self.window = neighbours.heap, neighbours.windows[neighbours.rank]
        self._layout = Layout(len(members))
        self._nbytes = self._layout.control_nbytes + (self._layout.slots_nbytes if device is None else 0)
        self._member = dict(zip(names, members, strict=True))
        neighbours.reap()
        try:
            self._block = self._heap.take(self._nbytes)
        except MemoryError as failure:
            raise TransportUnavailable(f"rank {self.rank}: shared memory of {key!r}: {failure}") from failure
        try:
            blocks = neighbours.exchange(list(members), key, self._block, timeout)
        except OSError as failure:
            self._heap.give_back(self._block, self._nbytes)
            raise TransportUnavailable(f"rank {self.rank}: shared memory of {key!r}: {failure}") from failure
        self._gives_way = gives_way_ns(len(members), neighbours.cores(members))
        self._state = State(self.window, self._block, self._gives_way, len(members) - 1)
        self.name = self.model = "shm" if device is None else device.name
        self._plane: Plane
        self.queue: DevicePlane | None = None
        if device is None:
            compiled = neighbours.compiled
            self._plane = HostPlane(self.rank, self.window, self._block, self._layout)
            self.segment_bytes = SEGMENT_BYTES if compiled and self.size == len(members) else PART_BYTES
        else:
            compiled = False
            self._plane = self.queue = device.plane(self.window, self._block, self._layout)
            self.segment_bytes = self.queue.part_bytes if self.size == len(members) else self.queue.far_part_bytes
        self._links: dict[int, Link] = {}
        for index, (name, member) in enumerate(zip(names, members, strict=True)):
            if index != own:
                theirs, words = neighbours.windows[member], self._state.of(len(self._links))
                here = (self.window, self._block, own, len(members), words)
                slots = self._plane.slots(index), self._plane.slot_bytes
                self._links[name] = Link(name, index, theirs, blocks[member], *here, *slots)
        self._words, self._at = self.window.words, self._block // 8
        self._base = self.window.address
        self._reports = Reports(self.rank, self.window, self._block, self._links.values(), self._layout)
        self.begun = (0, 0)  # contract and turn
        self.meanwhile: Callable[[], None] | None = None  # called every so often while a wait sleeps
        self._sender = Sender(self.window, self._block, self._links, self._plane, self._gives_way, self._state)
        if self.queue is not None:
            self.queue.meet(list(self._links.values()), self._member, self._sender.reach)
        self._receiver = Receiver(self.window, self._links, self._plane, self._until, self._sender.received)
        self.isend, self.expose, self.drain = self._sender.isend, self._sender.expose, self._sender.drain
        self.irecv, self.release = self._receiver.irecv, self._receiver.release
        links, shared = list(self._links.values()), self._plane.slots(own)[1]
        self.player = ShmPlayer(self._state, links, shared, self._check, self._left) if compiled else None
        neighbours.hold(self)
        for member in list(neighbours.gone):  # whoever went before that is not told of
            self.peer_lost(member)

    @property
    def counters(self) -> Counters:
        return self._sender.counters

    @counters.setter
    def counters(self, value: Counters) -> None:
        self._sender.counters = value

    @property
    def queued(self) -> int:
        """Sends that wait for room."""
        return self._sender.queued

    # ------------------------------------------------------------------ memory

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor in this rank's window, uninitialised."""
        return (self._heap if self.queue is None else self.queue).empty(elements, dtype)

    def holds(self, memory: Tensor) -> bool:
        """Whether `memory` lies in this rank's window."""
        return self._plane.offset(memory.data_ptr()) >= 0

    # ------------------------------------------------------------------ one collective

    def begin(self, contract: int, turn: int) -> None:
        self._reports = Reports(self.rank, self.window, self._block, self._links.values(), self._layout)
        self.begun = (contract, turn)
        self._sender.begin(contract)
        self._receiver.begin(contract)
        self._check()

    def _check(self) -> None:
        """Raises `Fault` if this rank cannot begin a collective."""
        if self._words[self._at + ALARM]:
            self._reports.check()
        if self._state.own[FORKED]:
            raise Fault(FaultKind.PEER, self.rank, "a forked child has no part in what its parent is a rank of")

    # ------------------------------------------------------------------ waiting

    def wait(self, request: Send | Receive | None, deadline: float) -> Tensor | None:
        if request is None:
            return None
        link = request.link
        if isinstance(request, Receive):
            return self._receiver.finish(request, deadline)
        if request.until < 0:
            self.drain()
        while request.until < 0:
            self._until(link, link.acked_words, link.acked_at, link.state[ACKED] + 1, deadline)
            self.drain()
        if request.until > link.state[ACKED]:
            if link.acked_words[link.acked_at] < request.until:
                self._until(link, link.acked_words, link.acked_at, request.until, deadline)
            link.state[ACKED] = link.acked_words[link.acked_at]
        order()
        if request.until > 0:
            self._plane.after_consumed(link, request.until)
        return None

    def passed(self, point: Event, deadline: float, hurry: threading.Event | None = None) -> None:
        if self.queue is not None:
            self.queue.passed(point, lambda held_by: self._look(held_by, deadline), hurry)
            forced = [link.words[link.words_at + FORCED] for link in self._links.values()]
            if self._words[self._at + ALARM] and (self._words[self._at + FORCED] or any(forced)):
                self._reports.check()  # what the stream went on with may not be what was sent

    def _look(self, held_by: int, deadline: float) -> None:
        """Raises `Fault` if the stream waits for this peer, and in vain."""
        link = self._links.get(held_by)
        if self._words[self._at + ALARM] and link is not None:
            self._reports.check()
        gone = None if link is None else self._left(link)
        if gone is not None:
            raise Fault(FaultKind.PEER, held_by, gone)
        if time.monotonic() >= deadline:
            raise Fault(FaultKind.TIMEOUT, self.rank if link is None else held_by, "deadline passed")

    def _until(self, link: Link, words: memoryview[int], at: int, value: int, deadline: float) -> None:
        """Returns once the word `at`, which only grows, has reached `value`; else raises `Fault`."""
        if self._sender.queued:
            self.drain()
        spin_end = time.monotonic_ns() + (self._gives_way or SPIN_NS)
        while time.monotonic_ns() < spin_end:
            if words[at] >= value:
                return
            if self._gives_way:
                futex.give_way()
        own, sleeping = self._words, self._at + SLEEPING
        address = self._base + self._block + 8 * SLEEPING
        while True:
            own[sleeping] = 1
            fence()  # a peer that writes after this sees that it must wake this rank
            if self._sender.queued:
                self.drain()
            if words[at] >= value:
                own[sleeping] = 0
                return
            if own[self._at + ALARM]:
                self._reports.check()
            gone = self._left(link)
            if gone is not None and words[at] < value:  # what it wrote before it went still counts
                raise Fault(FaultKind.PEER, link.rank, gone)
            left = deadline - time.monotonic()
            if left <= 0:
                raise Fault(FaultKind.TIMEOUT, link.rank, "deadline passed")
            if self.meanwhile is None:
                futex.sleep(address, 1, min(left, _LONGEST_SLEEP))
            else:
                futex.sleep(address, 1, min(left, _SHORT_SLEEP))
                self.meanwhile()

    def _left(self, link: Link) -> str | None:
        """Why the peer is no longer there, or None."""
        if link.words[link.words_at + CLOSED]:
            order()
            return "closed its communicator"
        return self._neighbours.gone.get(self._member[link.rank])

    def peer_lost(self, member: int) -> None:
        """Lets a sleeping wait look again, for `member` is gone."""
        if self._closed:
            return
        for link in self._links.values():
            link.state[GONE] |= self._member[link.rank] == member
        self._rouse()

    def _rouse(self) -> None:
        self._words[self._at + SLEEPING] = 0
        futex.wake(self._base + self._block + 8 * SLEEPING)

    def forget(self) -> None:
        """This process is a fork of the rank's own."""
        self._state.own[FORKED] = 1

    def settle(self, deadline: float) -> None:
        self._words[self._at + SETTLES] = 1
        for link in self._links.values():
            while link.queue or link.acked_words[link.acked_at] < link.state[SENT]:
                self.drain()
                settles = link.words[link.words_at + SETTLES]  # then it receives nothing more
                try:
                    soon = min(deadline, time.monotonic() + SETTLING_SECONDS)
                    self._until(link, link.acked_words, link.acked_at, link.state[SENT], soon)
                except Fault as fault:
                    if fault.kind == FaultKind.TIMEOUT and settles:
                        raise Fault(FaultKind.UNRECEIVED, link.rank) from None
                    if fault.kind != FaultKind.TIMEOUT or time.monotonic() >= deadline:
                        raise

    # ------------------------------------------------------------------ failing

    def abort(self, report: str) -> None:
        if self._closed or self._neighbours.forked or self._reports.written:
            return
        self._reports.write(report)
        self._heap.freeze()  # a peer that does not know yet may still put into exposed memory, until it leaves
        if self.queue is not None:
            self.queue.freeze()
        self._froze = True
        self._rouse()
        self._reports.alarm()
        if self.queue is not None:
            with contextlib.suppress(RuntimeError):  # a device that failed does nothing any more
                self.queue.drain()

    def reports(self, timeout: float) -> dict[int, str]:
        deadline = time.monotonic() + timeout
        while True:
            # The order matters: a peer that has left by now wrote its report before leaving, so that it is found.
            here = [link.rank for link in self._links.values() if self._left(link) is None]
            found = self._reports.read()
            if all(rank in found for rank in here) or time.monotonic() >= deadline:
                return found
            time.sleep(0.002)  # only after a failure, for half a second at most

    # ------------------------------------------------------------------ families, and the end

    def subset(self, members: Sequence[int], key: str) -> ShmTransport:
        return self.family(members, key, None, len(members))

    def family(self, members: Sequence[int], key: str, names: Sequence[int] | None, size: int) -> ShmTransport:
        """As `subset`, for the near ranks `members` of a group of `size`; `names` are their ranks in that group."""
        places = [self._member[rank] for rank in members]
        return ShmTransport(self._neighbours, places, key, self._timeout, names, size, self._device)

    def on_device(self, driver: Callable[[], Driver], key: str) -> ShmTransport:
        """As this one, for memory of a device. Every rank calls it, with the same `key`. Raises
        `TransportUnavailable`."""
        from ringred.transports.cuda.memory import DeviceMemory

        places, names = list(self._member.values()), list(self._member)
        memory = DeviceMemory(self._neighbours, places, driver, key, self._timeout)
        trouble: str | None = None
        try:
            made = ShmTransport(self._neighbours, places, key, self._timeout, names, self.size, memory)
        except RuntimeError as failure:  # its small slots did not find room, or its flags could not be registered
            trouble = f"{failure}"
        try:
            memory.agree(f"{key}: made", trouble, self._timeout)
        except (OSError, TransportUnavailable) as failure:
            if trouble is None:
                made.close()
            raise TransportUnavailable(f"rank {self.rank}: {key}: {failure}") from failure
        return made

    @property
    def peers(self) -> list[int]:  # the ranks that it reaches
        return list(self._links)

    def close(self) -> None:
        if self._closed or self._neighbours.forked:
            return
        self._neighbours.let_forget(self)
        self._closed = True
        settled = self._still()
        order()
        self._words[self._at + CLOSED] = 1
        for link in self._links.values():
            link.wake()
        order()
        for link in self._links.values():
            link.words[link.acked_at + LEFT] = 1  # the last that this rank writes there
        if self.queue is not None:
            deadline = time.monotonic() + UNSETTLED_SECONDS
            while not settled and not self._all_left() and time.monotonic() < deadline:
                time.sleep(SETTLING_SECONDS / 10)  # after a failure only, or where a peer's stream is slow
            with contextlib.suppress(RuntimeError):  # a device that failed: there is nothing to give back
                self.queue.close(settled or self._all_left())
        self._neighbours.retire(self._free_block)
        self._neighbours.let_go()

    def _still(self) -> bool:
        """Ends what the stream does; whether peers are done with this rank's memory as well."""
        if self.queue is None:
            return True
        try:
            settled = not self._reports.written and self.queue.settle()
            self.queue.drain()
        except RuntimeError:
            return False
        return settled

    def _all_left(self) -> bool:
        """Whether no peer reads or writes this rank's memory any more."""
        return all(
            self._words[link.taken_at + LEFT] or self._member[link.rank] in self._neighbours.gone
            for link in self._links.values()
        )

    def _free_block(self) -> bool:
        """Frees the control block if no peer reads it any more; returns whether it did."""
        if not self._all_left():
            return False
        if self._froze:
            self._heap.thaw()
            if self.queue is not None:
                self.queue.thaw()
        self._heap.give_back(self._block, self._nbytes)
        return True
