"""Data in the memory of a device, moved by one stream, and ordered between the streams of the ranks by flags.

A flag is a 32-bit word of the control block, which the block's owner sets on its stream: for each peer, the number of
the last message whose data is there, and of the last one that was read; and how often memory was exposed. Only one
stream waits for a flag, after its host has seen the word which says that the setting is enqueued: so a stream never
waits for what no stream will do, unless a rank dies. Then `drain` sets the flags that this rank's stream waits for.

NVIDIA's scheduler knows nothing of this order. All that a rank enqueues goes to one stream, which never waits for a
flag that it sets itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringred.transports import futex
from ringred.transports.base import UNSETTLED_SECONDS, Fault, FaultKind
from ringred.transports.cuda.driver import Event, Kernel, MemberGone
from ringred.transports.cuda.kernels import MOST
from ringred.transports.cuda.queue import StreamQueue
from ringred.transports.futex import order
from ringred.transports.links import (
    ABORTED,
    EXPOSED_COUNT,
    FLAG_STRIDE,
    FORCED,
    GONE,
    SENT,
    Layout,
    Link,
)
from ringred.transports.windows import Window

if TYPE_CHECKING:
    from ringred.transports.cuda.memory import DeviceMemory

__all__ = ["DevicePlane"]

_SENT, _CONSUMED, _EXPOSED = range(3)
_SPIN_NS = 50_000
_LOOK = 0.0005  # seconds between two looks at a stream, after a while
_DRAINING = 5.0  # seconds after which a stream that does not end, although nothing holds it, is given up
_32_BITS = (1 << 32) - 1


class DevicePlane(StreamQueue):
    """The plane of the transport whose control block is at `block` of this rank's `window`. See `planes.Plane`."""

    slot_bytes = 2 << 20
    part_bytes = 32 << 20
    far_part_bytes = 8 << 20
    """The same where some ranks are on other hosts, to which copies and messages overlap segment by segment."""

    def __init__(self, memory: DeviceMemory, window: Window, block: int, layout: Layout) -> None:
        super().__init__(memory.driver)
        self._memory, self._window, self._block, self._layout = memory, window, block, layout
        self._sizes = Layout(layout.size, self.slot_bytes)
        self._small = memory.take(self._sizes.large)
        self._large: dict[int, int] = {}  # by peer, the slots that were needed so far
        self._put: set[tuple[int, int]] = set()  # peer, and address here, of what a fold has put there as well
        self._registered: list[int] = []  # the addresses of control blocks
        self._links: dict[int, Link] = {}
        self._waited: dict[tuple[int, int], int] = {}  # by peer and kind: the greatest value that was waited for
        self._waiting = threading.Lock()
        self._gave_up = False  # whether its stream waits for nothing any more
        self._exposed = 0
        self._stuck = False  # whether its stream does not end, whatever is done
        self._views: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def meet(self, links: Sequence[Link], members: dict[int, int], reach: Callable[[int, int, int], int]) -> None:
        """Tells it of the links, and which member each leads to. `reach(peer, address, nbytes)` is the offset in
        the memory that a peer has exposed to which a put of bytes from an address goes; −1 if none is possible."""
        self._members, self._reach = members, reach
        self._flags = self._register(self._window.address + self._block)
        self._theirs = {link.rank: self._register(link.window.address + link.block) for link in links}
        self._links = {link.rank: link for link in links}

    def _register(self, block: int) -> int:
        device = self.driver.register(block, self._layout.control_nbytes)
        self._registered.append(block)
        return device + self._layout.flags

    # ------------------------------------------------------------------ places

    def slots(self, index: int) -> tuple[int, int]:
        small, _ = self._sizes.slots(index)
        return self._small + small, -1

    def take_slots(self, index: int) -> int:
        nbytes = self._sizes.large_nbytes
        try:
            offset = self._large[index] = self._memory.take(nbytes)
        except RuntimeError as failure:
            rank = next(link.rank for link in self._links.values() if link.index == index)
            raise RuntimeError(
                f"expected room for {nbytes >> 20} MiB of its memory, in which messages to rank {rank} lie on the way "
                f"(those from memory of comm.empty need none): {failure}"
            ) from failure
        return offset

    def offset(self, address: int) -> int:
        return self._memory.offset(address)

    def within(self, link: Link, offset: int, nbytes: int) -> bool:
        return self._memory.within(self._members[link.rank], offset, nbytes)

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        """As `base.Windowed.empty`."""
        return self._memory.empty(elements, dtype)

    def _there(self, link: Link, offset: int) -> int:
        try:
            return self._memory.address(self._members[link.rank], offset)
        except MemberGone as gone:
            raise Fault(FaultKind.PEER, link.rank, str(gone)) from gone

    # ------------------------------------------------------------------ moving

    def fill(self, offset: int, source: Tensor, start: int, nbytes: int) -> None:
        if nbytes:
            self.stream.copy(self._memory.address(None, offset), source.data_ptr() + start, nbytes)

    def fill_short(self, offset: int, source: Tensor, nbytes: int) -> None:
        self.fill(offset, source, 0, nbytes)

    def fetch(self, target: Tensor, start: int, link: Link, offset: int, nbytes: int) -> None:
        self.stream.copy(target.data_ptr() + start, self._there(link, offset), nbytes)

    def lend(self, link: Link, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        key = (link.rank, offset, nbytes, dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= 4096:
                self._views.clear()
            view = self._views[key] = self.driver.tensor(self._there(link, offset), nbytes, dtype, None)
        return view

    def put(self, link: Link, offset: int, source: Tensor) -> None:
        if source.nbytes:
            self.stream.copy(self._there(link, offset), source.data_ptr(), source.nbytes)

    def fold(
        self, kernel: Kernel, out: Tensor, operands: Sequence[Tensor], final: bool, peers: Sequence[int] = ()
    ) -> None:
        """As `base.Queue.fold`: one pass over memory folds, and puts the result where peers have exposed theirs."""
        address, also = out.data_ptr(), []
        for peer in peers[: MOST - 1]:
            offset = self._reach(peer, address, out.nbytes)
            if offset >= 0:
                also.append(self._there(self._links[peer], offset))
                self._put.add((peer, address))
        self.stream.fold(kernel, out, operands, final, also)

    def was_put(self, link: Link, source: Tensor) -> bool:
        key = link.rank, source.data_ptr()
        there = key in self._put
        self._put.discard(key)
        return there

    # ------------------------------------------------------------------ ordering

    def _flag_place(self, kind: int, index: int) -> int:
        """Where in a rank's flags the one is for the peer with this index; all peers share that of exposed memory."""
        return FLAG_STRIDE * (2 * self._layout.size if kind == _EXPOSED else 2 * index + kind)

    def _mark(self, kind: int, index: int, number: int) -> None:
        self.stream.set_flag(self._flags + self._flag_place(kind, index), number & _32_BITS)

    def _wait(self, link: Link, kind: int, number: int) -> None:
        if number <= self._waited.get((link.rank, kind), 0):
            return
        with self._waiting:
            if self._gave_up:  # nobody would let the stream go on
                raise Fault(FaultKind.ABORTED, link.rank, "this rank has given its communicator up")
            self._waited[link.rank, kind] = number
            self.stream.wait_flag(self._theirs[link.rank] + self._flag_place(kind, link.own), number & _32_BITS)

    def mark_sent(self, link: Link, number: int) -> None:
        self._mark(_SENT, link.index, number)

    def after_sent(self, link: Link, number: int) -> None:
        self._wait(link, _SENT, number)

    def mark_consumed(self, link: Link, number: int) -> None:
        self._mark(_CONSUMED, link.index, number)

    def after_consumed(self, link: Link, number: int) -> None:
        self._wait(link, _CONSUMED, number)

    def mark_exposed(self) -> None:
        self._exposed += 1
        self._mark(_EXPOSED, 0, self._exposed)
        self._window.words[self._block // 8 + EXPOSED_COUNT] = self._exposed

    def after_exposed(self, link: Link) -> None:
        self._wait(link, _EXPOSED, link.words[link.words_at + EXPOSED_COUNT])

    # ------------------------------------------------------------------ the stream and its end

    def passed(self, point: Event, look: Callable[[int], None], hurry: threading.Event | None = None) -> None:
        """Returns once the stream has come to `point`. Meanwhile it calls `look` every so often, with the peer whose
        flag holds the stream, or −1; that may raise. A look takes the interpreter from other threads: with `hurry`, it
        looks less often until that is set."""
        if hurry is not None:
            while not point.done():
                look(self.held_by())
                if hurry.wait(_LOOK):
                    break
        until, pause = time.monotonic_ns() + _SPIN_NS, _LOOK / 25
        while not point.done():
            if time.monotonic_ns() < until:
                futex.give_way()
                continue
            look(self.held_by())
            time.sleep(pause)
            pause = min(_LOOK, 1.2 * pause)

    def held_by(self) -> int:
        """The first peer whose flag has not reached what the stream waits for, in all that is enqueued; or −1."""
        for (rank, kind), value in list(self._waited.items()):  # another thread may enqueue meanwhile
            if self._flag_of(rank, kind) - value & 1 << 31:
                return rank
        return -1

    def _flag_at(self, rank: int, kind: int) -> int:
        link = self._links[rank]
        return link.block + self._layout.flags + self._flag_place(kind, link.own)

    def _flag_of(self, rank: int, kind: int) -> int:
        at = self._flag_at(rank, kind)
        return int.from_bytes(self._links[rank].window.memory[at : at + 4], "little")

    def drain(self) -> None:
        """Ends all waiting of the stream, which goes on with whatever is there: for a communicator that has failed,
        once all ranks can know that, so that none takes for a result what this one sends from now on."""
        self._stuck = True
        with self._waiting:
            self._gave_up = True
        event: Event = self.stream.record()
        began = time.monotonic()
        while not event.done() and time.monotonic() < began + _DRAINING:
            if time.monotonic() < began + _SPIN_NS / 1e9:
                futex.give_way()
                continue
            if self.held_by() >= 0:
                self._window.words[self._block // 8 + FORCED] = 1
                order()
                for (rank, kind), value in list(self._waited.items()):
                    at = self._flag_at(rank, kind)
                    self._links[rank].window.memory[at : at + 4] = (value & _32_BITS).to_bytes(4, "little")
            time.sleep(_LOOK)
        self._stuck = not event.done()

    def settle(self) -> bool:
        """Whether the streams of all peers have read what was sent to them; waits some seconds for that. Then nobody
        looks at this rank's memory any more."""
        deadline = time.monotonic() + UNSETTLED_SECONDS
        for link in self._links.values():
            while self._flag_of(link.rank, _CONSUMED) - link.state[SENT] & 1 << 31:
                if link.state[GONE] or link.words[link.words_at + ABORTED] or time.monotonic() > deadline:
                    return False
                time.sleep(_LOOK)
        return True

    def freeze(self) -> None:
        """As `Heap.freeze`."""
        self._memory.freeze()

    def thaw(self) -> None:
        """As `Heap.thaw`."""
        self._memory.thaw()

    def close(self, freely: bool) -> None:
        """Gives its stream back, and if no peer looks at it any more, which `freely` says, its memory. A stream that
        could not be drained keeps all that it may still use."""
        self._memory.forget(self.stream)
        self._views.clear()
        if not self._stuck:
            self.stream.close()
            for block in self._registered:
                self.driver.unregister(block)
        slots = [(self._small, self._sizes.large), *((at, self._sizes.large_nbytes) for at in self._large.values())]
        self._memory.let_go(slots if freely and not self._stuck else None)
