"""Transport between ranks of one host, which access each other's memory.

Each rank has a window that all map (`windows`). In it, for every peer, lies a ring of descriptors that this rank
writes and the peer reads: the contract of a message, its length, where it lies, and its number, which is written
last and says that the rest is there. A message is read in place (a tensor in the sender's window), or from a slot into
which its sender copied it, or its sender has put it into the receiver's window. The receiver publishes the number of
the last message that it has finished with, which frees slots and descriptors.

Why this needs no lock, and on x86-64 one fence only: docs/design/shared-memory.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ringred.errors import TransportUnavailable
from ringred.transports import futex
from ringred.transports.base import SETTLING_SECONDS, Counters, Fault, FaultKind
from ringred.transports.futex import fence, order
from ringred.transports.links import (
    ABORTED,
    ACKED,
    ALARM,
    AT,
    CLOSED,
    CONTRACT,
    ENTRIES,
    FORKED,
    GONE,
    LEFT,
    LENGTH,
    NUMBER,
    PART,
    PART_BYTES,
    PLACE,
    PUT,
    REPORT_BYTES,
    REPORT_LENGTH,
    SEGMENT_BYTES,
    SENT,
    SETTLES,
    SLEEPING,
    TAKEN,
    Layout,
    Link,
    Receive,
    Send,
    State,
)
from ringred.transports.neighbours import Neighbours
from ringred.transports.shm_player import ShmPlayer
from ringred.transports.shm_sending import SPIN_NS, Sender
from ringred.transports.windows import Views

__all__ = ["ShmTransport"]

_LONGEST_SLEEP = 1.0  # seconds; it matters only if a peer dies between its write and waking this rank
_SHORT_SLEEP = 0.0005  # seconds, if another transport must make progress meanwhile


class ShmTransport:
    """Connects the ranks `members` of `neighbours`, numbered in that order or, if given, by `names`.

    Every member constructs it at the same point of the program, with the same `key`. Raises `TransportUnavailable`.
    """

    name = "shm"
    windows = True
    buffers = True

    def __init__(
        self,
        neighbours: Neighbours,
        members: Sequence[int],
        key: str,
        timeout: float,
        names: Sequence[int] | None = None,
        size: int | None = None,
    ) -> None:
        names = list(range(len(members))) if names is None else list(names)
        own = list(members).index(neighbours.rank)
        self.rank, self.size = names[own], len(members) if size is None else size
        self._froze = self._closed = False
        self.segment_bytes = SEGMENT_BYTES if neighbours.compiled and self.size == len(members) else PART_BYTES
        self._neighbours, self._timeout = neighbours, timeout
        self._heap, self.window, self._layout = (
            neighbours.heap,
            neighbours.windows[neighbours.rank],
            Layout(len(members)),
        )
        self._member = dict(zip(names, members, strict=True))
        neighbours.reap()
        try:
            self._block = self._heap.take(self._layout.nbytes)
        except MemoryError as failure:
            raise TransportUnavailable(f"rank {self.rank}: shared memory of {key!r}: {failure}") from failure
        try:
            blocks = neighbours.exchange(list(members), key, self._block, timeout)
        except OSError as failure:
            self._heap.give_back(self._block, self._layout.nbytes)
            raise TransportUnavailable(f"rank {self.rank}: shared memory of {key!r}: {failure}") from failure
        self._crowded = len(members) > neighbours.cores(members)
        self._state = State(self.window, self._block, self._crowded, len(members) - 1)
        self._links: dict[int, Link] = {}
        for index, (name, member) in enumerate(zip(names, members, strict=True)):
            if index != own:
                theirs, words = neighbours.windows[member], self._state.of(len(self._links))
                here = (self.window, self._block, own, len(members), words)
                self._links[name] = Link(name, index, theirs, blocks[member], *here)
        self._words, self._at = self.window.words, self._block // 8
        self._base, self._end = self.window.address, self.window.address + self.window.nbytes
        self._contract, self.begun = 0, (0, 0)  # contract, and both contract and turn
        self.meanwhile: Callable[[], None] | None = None  # called every so often while a wait sleeps
        self._views = Views()
        self._sender = Sender(self.rank, self.window, self._block, self._links, self._views, self._crowded, self._state)
        self.isend, self.expose, self.drain = self._sender.isend, self._sender.expose, self._sender.drain
        links = list(self._links.values())
        self.player = ShmPlayer(self._state, links, self._check, self._left) if neighbours.compiled else None
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
        return self._heap.empty(elements, dtype)

    def holds(self, memory: Tensor) -> bool:
        """Whether `memory` lies in this rank's window."""
        return self._base <= memory.data_ptr() < self._end

    # ------------------------------------------------------------------ one collective

    def begin(self, contract: int, turn: int) -> None:
        self._contract, self.begun = contract, (contract, turn)
        self._sender.begin(contract)
        self._check()

    def _check(self) -> None:
        """Raises `Fault` if this rank cannot begin a collective."""
        if self._words[self._at + ALARM]:
            self._check_aborted()
        if self._state.own[FORKED]:
            raise Fault(FaultKind.PEER, self.rank, "a forked child has no part in what its parent is a rank of")

    # ------------------------------------------------------------------ receiving

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> Receive:
        link = self._links[peer]
        request = Receive(link, dst, lend, self._contract)
        link.pending.append(request)
        return request

    def wait(self, request: Send | Receive | None, deadline: float) -> Tensor | None:
        if request is None:
            return None
        link = request.link
        if isinstance(request, Receive):
            while link.pending and request.number == 0 and request.view is None:
                self._take(link, link.pending[0], deadline, wanted=link.pending[0] is request)
                link.pending.popleft()
            return request.view
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
        return None

    def _take(self, link: Link, request: Receive, deadline: float, wanted: bool) -> None:
        """Finishes the next receive from a peer, or lends what came for it."""
        dst, got = request.dst, 0
        staging: Tensor | None = None
        while True:
            number = link.state[TAKEN] + 1
            entry = link.entries_in + (number % ENTRIES) * 4
            words = link.words
            if words[entry + NUMBER] != number:
                self._until(link, words, entry + NUMBER, number, deadline)
            order()
            nbytes, place = words[entry + LENGTH], words[entry + PLACE]
            expected = dst.nbytes
            if words[entry + CONTRACT] != request.contract or nbytes != expected:
                size = dst.element_size()
                raise Fault(
                    FaultKind.MISMATCH, link.rank, f"expected {expected // size} elements, got {nbytes // size}"
                )
            link.state[TAKEN] = number
            offset, kind = place >> 2, place & 3
            if kind == AT and request.lend and not got and wanted and nbytes:
                request.view = self._views.of(link.rank, link.window, offset, nbytes, dst.dtype)
                request.number = number
                self._sender.received(nbytes)
                return
            if request.lend and staging is None:
                staging = torch.empty_like(dst)
            if kind != PUT and nbytes:
                part = min(nbytes - got, PART_BYTES) if kind == PART or got else nbytes
                target = dst if staging is None else staging
                futex.copy(target.data_ptr() + got, link.window.address + offset, part)
                got += part
            self._consume(link, number)
            if kind != PART:
                request.number, request.view = -1, staging
                self._sender.received(nbytes)
                return

    def _consume(self, link: Link, number: int) -> None:
        order()
        self._words[link.taken_at] = number
        link.wake()

    def release(self, request: Receive) -> None:
        if request.number > 0:
            self._consume(request.link, request.number)
        request.number, request.view = -1, None

    # ------------------------------------------------------------------ waiting

    def _until(self, link: Link, words: memoryview[int], at: int, value: int, deadline: float) -> None:
        """Returns once the word `at`, which only grows, has reached `value`; else raises `Fault`."""
        if self._sender.queued:
            self.drain()
        spin_end = time.monotonic_ns() + SPIN_NS
        while time.monotonic_ns() < spin_end:
            if words[at] >= value:
                return
            if self._crowded:
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
                self._check_aborted()
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

    def _check_aborted(self) -> None:
        reports = self._reports()
        if reports:
            culprit = next(iter(reports))
            raise Fault(FaultKind.ABORTED, culprit, reports[culprit])

    def _reports(self) -> dict[int, str]:
        found = {}
        blocks = {self.rank: (self.window, self._block)}
        blocks |= {link.rank: (link.window, link.block) for link in self._links.values()}
        for rank in sorted(blocks):
            window, block = blocks[rank]
            if window.words[block // 8 + ABORTED]:
                order()
                length = min(window.words[block // 8 + REPORT_LENGTH], REPORT_BYTES)
                start = block + self._layout.report
                found[rank] = window.memory[start : start + length].decode(errors="replace")
        return found

    def abort(self, report: str) -> None:
        if self._closed or self._neighbours.forked or self._words[self._at + ABORTED]:
            return
        text = report.encode()[:REPORT_BYTES]
        start = self._block + self._layout.report
        self.window.memory[start : start + len(text)] = text
        self._words[self._at + REPORT_LENGTH] = len(text)
        order()
        self._words[self._at + ABORTED] = 1
        order()
        self._words[self._at + ALARM] = 1
        self._heap.freeze()  # a peer that does not know yet may still put into exposed memory, until it leaves
        self._froze = True
        self._rouse()
        for link in self._links.values():
            link.words[link.words_at + ALARM] = 1
            link.wake()

    def reports(self, timeout: float) -> dict[int, str]:
        deadline = time.monotonic() + timeout
        while True:
            # The order matters: a peer that has left by now wrote its report before leaving, so that it is found.
            here = [link.rank for link in self._links.values() if self._left(link) is None]
            found = self._reports()
            if all(rank in found for rank in here) or time.monotonic() >= deadline:
                return found
            time.sleep(0.002)  # only after a failure, for half a second at most

    # ------------------------------------------------------------------ families, and the end

    def subset(self, members: Sequence[int], key: str) -> ShmTransport:
        return self.family(members, key, None, len(members))

    def family(self, members: Sequence[int], key: str, names: Sequence[int] | None, size: int) -> ShmTransport:
        """As `subset`, for the near ranks `members` of a group of `size`; `names` are their ranks in that group."""
        return ShmTransport(self._neighbours, [self._member[rank] for rank in members], key, self._timeout, names, size)

    @property
    def peers(self) -> list[int]:  # the ranks that it reaches
        return list(self._links)

    def close(self) -> None:
        if self._closed or self._neighbours.forked:
            return
        self._neighbours.let_forget(self)
        self._closed = True
        order()
        self._words[self._at + CLOSED] = 1
        for link in self._links.values():
            link.wake()
        order()
        for link in self._links.values():
            link.words[link.acked_at + LEFT] = 1  # the last that this rank writes there
        self._neighbours.retire(self._free_block)
        self._neighbours.let_go()

    def _free_block(self) -> bool:
        """Frees the control block if no peer reads it any more; returns whether it did."""
        for link in self._links.values():
            if not self._words[link.taken_at + LEFT] and self._member[link.rank] not in self._neighbours.gone:
                return False
        if self._froze:
            self._heap.thaw()
        self._heap.give_back(self._block, self._layout.nbytes)
        return True
