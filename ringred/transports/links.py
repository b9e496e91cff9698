"""What `shm` keeps of each pair of ranks: the words and slots of a control block, and the state of both directions.

A rank's control block lies in its window. Other ranks write only three things there: its alarm, the word SLEEPING
when they wake it, and, each on a cache line of its own, that they will not read the block any more.

What a rank counts for itself (messages sent, slots used) lies in words of its own memory, which the compiled player
reads and writes too; `native/layout.h` has the same numbers.
"""

from __future__ import annotations

from array import array
from collections import deque

from torch import Tensor

from ringred import native
from ringred.transports import futex
from ringred.transports.base import Tape
from ringred.transports.futex import fence
from ringred.transports.windows import Window

__all__ = ["LAYOUT", "Layout", "Link", "Receive", "Send", "Slots", "State"]

PART_BYTES = 512 << 10
"""The most bytes that Python puts into slots at once, and so a segment: it hides Python's overhead, and fits into a
cache. The compiled player sends longer messages in parts of a segment of its own."""
SEGMENT_BYTES = 128 << 10
"""A segment where plans are compiled: the peer is done with one before a rank that waits for it sleeps."""
SLOT_BYTES = 64 << 10
"""The size of a large slot; a message takes as many as it needs, one after the other."""
SLOTS = 32
SMALL_BYTES = 512
"""A message up to this goes into a small slot, even if it lies in the window: it is quickly copied, and its sender then
need not wait until it is read. (Not one that a fold has put already.)"""
SMALL_SLOTS = 16
ENTRIES = 256
"""Descriptors from one rank to another: how many messages may be in flight."""
REPORT_BYTES = 16 << 10

# Words of a control block (8 bytes each); what different ranks write lies on different lines (8 words).
SLEEPING, ALARM, ABORTED, CLOSED, REPORT_LENGTH, SETTLES, FORCED = 0, 8, 16, 17, 18, 19, 20
EXPOSED_CONTRACT, EXPOSED_AT, EXPOSED_COUNT = 24, 25, 26
NOWHERE = 1 << 62  # EXPOSED_AT of a rank whose memory does not lie in its window
CONSUMED = 32  # a cache line per peer: the last message consumed, and LEFT, which the peer sets when it stops reading
LEFT = 1
CONTRACT, LENGTH, PLACE, NUMBER = 0, 1, 2, 3  # words of a descriptor
# Kinds of place, in the bits below its offset: AT, in the sender's window, in the user's memory or in slots that Python
# filled; PUT, in the receiver's; PART, in slots that Python filled, more parts of PART_BYTES follow; SLOT, in slots
# that the compiled player filled; SLOT_PART, there, more parts of SEGMENT_BYTES follow.
AT, PUT, PART, SLOT, SLOT_PART, KIND_BITS = 0, 1, 2, 3, 4, 3
FLAG_STRIDE = 64  # bytes from one flag to the next: two a peer, one of the memory that is exposed (`planes`)
SMALL_STRIDE = SMALL_BYTES + 64  # small slots do not all fall on the same cache sets

# Words of a rank's own state: first its own, then those of each link.
OWN_WINDOW, OWN_END, OWN_BLOCK, OWN_CONTRACT, EXPOSED, EXPOSED_END, GIVES_WAY, LINKS = range(8)
FORKED, QUEUED, COUNTERS, SHARED = range(8, 12)
WINDOW, WINDOW_END, BLOCK, ACKED_WORD, TAKEN_WORD, ENTRIES_IN, ENTRIES_OUT, SMALL, LARGE = range(9)
SENT, ACKED, TAKEN, AWAITED, SMALL_NEXT, LARGE_NEXT, SMALL_USED = range(9, 16)
LARGE_USED = SMALL_USED + SMALL_SLOTS
GONE = LARGE_USED + 2 * SLOTS  # between them those of the slots that are shared
OWN_WORDS, LINK_WORDS = 16, 104
LAYOUT: tuple[int, ...] = (native.VERSION, SLEEPING, ALARM, CLOSED, EXPOSED_CONTRACT, EXPOSED_AT, ENTRIES)
LAYOUT += (
    SMALL_BYTES,
    SMALL_SLOTS,
    SMALL_STRIDE,
    SLOT_BYTES,
    SLOTS,
    PART_BYTES,
    SEGMENT_BYTES,
    SLOT,
    SLOT_PART,
    KIND_BITS,
)
LAYOUT += (OWN_WORDS, LINK_WORDS, Tape.REQUEST_WORDS)
"""What the compiled player has to agree on: a version, and these numbers."""


class Layout:
    """Where things lie in the control block of a rank among `size`, in bytes from its start, and in its slots, whose
    memory may be elsewhere."""

    def __init__(self, size: int, slot_bytes: int = SLOT_BYTES) -> None:
        self.size = size
        self.flags = 8 * (CONSUMED + 8 * size)
        self.entries = self.flags + 2 * FLAG_STRIDE * size + FLAG_STRIDE
        self.report = self.entries + size * ENTRIES * 32
        self.control_nbytes = -(-(self.report + REPORT_BYTES) // 4096) * 4096
        self.large = -(-size * SMALL_SLOTS * SMALL_STRIDE // 4096) * 4096
        self.large_nbytes = SLOTS * slot_bytes  # for one peer
        self.slots_nbytes = self.large + size * self.large_nbytes

    def slots(self, index: int) -> tuple[int, int]:
        """Where the small and the large slots for one peer begin. A rank's large slots for itself are shared: there the
        compiled player makes one copy of a message that goes to several peers."""
        return index * SMALL_SLOTS * SMALL_STRIDE, self.large + index * self.large_nbytes


class State:
    """The words of one rank's own state: `own`, and those of each of `links` links."""

    def __init__(self, window: Window, block: int, gives_way: int, links: int) -> None:
        words = array("q", bytes(8 * (OWN_WORDS + LINK_WORDS * links)))
        self.address, _ = words.buffer_info()
        self._words = memoryview(words)
        self.own = self._words[:OWN_WORDS]
        self.own[OWN_WINDOW], self.own[OWN_END] = window.address, window.address + window.nbytes
        self.own[OWN_BLOCK], self.own[GIVES_WAY], self.own[LINKS] = window.address + block, gives_way, links

    def of(self, number: int) -> memoryview[int]:
        """The words of a link."""
        start = OWN_WORDS + LINK_WORDS * number
        return self._words[start : start + LINK_WORDS]


class Slots:
    """A ring of `count` slots in this rank's data, from offset `start`, `stride` bytes apart.

    In the words of the link lie, at `next_at`, which slot is next, and from `used_at` on the number of the message that
    each was last used for."""

    __slots__ = ("count", "next_at", "start", "stride", "used_at")

    def __init__(self, start: int, stride: int, count: int, next_at: int, used_at: int) -> None:
        self.start, self.stride, self.count = start, stride, count
        self.next_at, self.used_at = next_at, used_at


class Link:
    """Both directions between this rank, whose index among the members is `own`, and one peer, whose is `index`.

    `slots` are the offsets of the small and the large slots for it. `state` has the numbers of the last message (or
    part of one) that was SENT, that the peer has consumed (ACKED), and that was TAKEN here."""

    __slots__ = (
        "acked_at",
        "acked_words",
        "block",
        "entries_in",
        "entries_out",
        "index",
        "large",
        "own",
        "pending",
        "queue",
        "rank",
        "sleep_address",
        "small",
        "state",
        "taken_at",
        "window",
        "words",
        "words_at",
    )

    def __init__(
        self,
        rank: int,
        index: int,
        window: Window,
        block: int,
        own_window: Window,
        own_block: int,
        own: int,
        size: int,
        state: memoryview[int],
        slots: tuple[int, int],
        slot_bytes: int,
    ) -> None:
        layout = Layout(size)
        self.rank, self.window, self.block, self.state = rank, window, block, state
        self.index, self.own = index, own
        self.words, self.words_at = window.words, block // 8
        self.sleep_address = window.address + block + 8 * SLEEPING
        # What this rank sends: entries are in its own block, the count of what is consumed in the peer's.
        self.entries_out = (own_block + layout.entries) // 8 + index * ENTRIES * 4
        small, large = slots
        self.small = Slots(small, SMALL_STRIDE, SMALL_SLOTS, SMALL_NEXT, SMALL_USED)
        self.large = Slots(large, slot_bytes, SLOTS, LARGE_NEXT, LARGE_USED)
        self.acked_words, self.acked_at = window.words, block // 8 + CONSUMED + 8 * own
        self.queue: deque[Send] = deque()
        # What it receives: the other way round.
        self.entries_in = (block + layout.entries) // 8 + own * ENTRIES * 4
        self.taken_at = own_block // 8 + CONSUMED + 8 * index
        self.pending: deque[Receive] = deque()
        state[WINDOW], state[WINDOW_END] = window.address, window.address + window.nbytes
        state[BLOCK], state[SMALL], state[LARGE] = window.address + block, small, large
        state[ACKED_WORD] = window.address + 8 * self.acked_at
        state[TAKEN_WORD] = own_window.address + 8 * self.taken_at
        state[ENTRIES_IN] = window.address + 8 * self.entries_in
        state[ENTRIES_OUT] = own_window.address + 8 * self.entries_out

    def wake(self) -> None:
        """Wakes the peer, if it sleeps, to see what was just written."""
        fence()
        if self.words[self.words_at + SLEEPING]:
            self.rouse()

    def rouse(self) -> None:
        self.words[self.words_at + SLEEPING] = 0
        futex.wake(self.sleep_address)


class Send:
    """A message that is not done yet, to the peer of `link`."""

    __slots__ = ("contract", "done", "link", "nbytes", "place", "source", "until")

    def __init__(self, link: Link, source: Tensor, nbytes: int, contract: int) -> None:
        self.link, self.source, self.nbytes, self.contract = link, source, nbytes, contract
        self.place = -1  # where the receiver finds it without a slot
        self.done = 0  # bytes that went into slots
        self.until = -1  # the source is free once the peer has consumed this message; −1 unknown, 0 at once


class Receive:
    """A message that is waited for, or lent, from the peer of `link`."""

    __slots__ = ("contract", "dst", "lend", "link", "number", "view")

    def __init__(self, link: Link, dst: Tensor, lend: bool, contract: int) -> None:
        self.link, self.dst, self.lend, self.contract = link, dst, lend, contract
        self.view: Tensor | None = None
        self.number = 0  # the message that is lent, until it is released; −1 once all is done
