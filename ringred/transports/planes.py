"""Planes: where the data of `shm`'s messages lies, who moves it, and how it is ordered.

The words of a control block (shm.py) say what the ranks have done; they always lie in host memory, and this rank's
thread reads and writes them. Data may lie elsewhere and be moved later, by a stream of a device: then a word says that
something was enqueued, and the plane orders the streams as the words order the threads.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ringred.transports import futex
from ringred.transports.links import PART_BYTES, SLOT_BYTES, Layout, Link
from ringred.transports.windows import Views, Window

__all__ = ["HostPlane", "Plane"]

_BY_ADDRESS = 32 << 10  # bytes up to which copying by address is quicker than by a tensor


class Plane(Protocol):
    """Offsets are places in a rank's data, which its peers understand too: they reach it there.

    `part_bytes` are the most that go into slots at once, `slot_bytes` is the size of a large slot.
    """

    part_bytes: int
    slot_bytes: int

    def slots(self, index: int) -> tuple[int, int]:
        """The offsets of this rank's small and large slots for the peer with this index among the members; −1 for large
        ones that are taken when they are needed."""

    def take_slots(self, index: int) -> int:
        """Takes large slots that were not taken yet: their offset."""

    def offset(self, address: int) -> int:
        """The offset of memory at an address, or −1 if peers do not reach it."""

    def within(self, link: Link, offset: int, nbytes: int) -> bool:
        """Whether the peer has data there."""

    # Moving it

    def fill_short(self, offset: int, source: Tensor, nbytes: int) -> None:
        """Copies a short tensor to a slot."""

    def fill(self, offset: int, source: Tensor, start: int, nbytes: int) -> None:
        """Copies `nbytes` bytes of `source`, from byte `start` on, to a slot."""

    def fetch(self, target: Tensor, start: int, link: Link, offset: int, nbytes: int) -> None:
        """Copies bytes of a peer's to `target`, from its byte `start` on."""

    def lend(self, link: Link, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """Bytes of a peer's as a tensor."""

    def put(self, link: Link, offset: int, source: Tensor) -> None:
        """Copies `source` to a peer's memory."""

    def was_put(self, link: Link, source: Tensor) -> bool:
        """Whether what made `source` has put it there as well; asked once for each put."""

    # Ordering it: a mark comes before the word that tells of it; what is after a mark is so from the call on

    def mark_sent(self, link: Link, number: int) -> None:
        """The data of messages up to `number` is where their descriptors say."""

    def after_sent(self, link: Link, number: int) -> None:
        """From here on, the peer's message `number` may be read."""

    def mark_consumed(self, link: Link, number: int) -> None:
        """The peer's messages up to `number` are not read any more."""

    def after_consumed(self, link: Link, number: int) -> None:
        """From here on, what message `number` to the peer was read from may be overwritten."""

    def mark_exposed(self) -> None:
        """Peers may write to exposed memory."""

    def after_exposed(self, link: Link) -> None:
        """From here on, the memory that the peer has exposed may be written to."""


class HostPlane:
    """Data in the windows themselves: this thread moves it at once, and the words order it."""

    part_bytes, slot_bytes = PART_BYTES, SLOT_BYTES

    def __init__(self, rank: int, window: Window, block: int, layout: Layout) -> None:
        self._rank, self._window = rank, window
        self._base, self._end = window.address, window.address + window.nbytes
        self._slots, self._layout = block + layout.control_nbytes, layout
        self._views = Views()

    def slots(self, index: int) -> tuple[int, int]:
        small, large = self._layout.slots(index)
        return self._slots + small, self._slots + large

    def take_slots(self, index: int) -> int:
        raise AssertionError("they are in the window from the beginning")

    def offset(self, address: int) -> int:
        return address - self._base if self._base <= address < self._end else -1

    def within(self, link: Link, offset: int, nbytes: int) -> bool:
        return offset + nbytes <= link.window.nbytes

    def fill_short(self, offset: int, source: Tensor, nbytes: int) -> None:
        futex.copy_short(self._base + offset, source.data_ptr(), nbytes)

    def fill(self, offset: int, source: Tensor, start: int, nbytes: int) -> None:
        if _BY_ADDRESS < nbytes == source.nbytes:
            self._views.of(self._rank, self._window, offset, nbytes, source.dtype).copy_(source)
        elif nbytes:
            futex.copy(self._base + offset, source.data_ptr() + start, nbytes)

    def fetch(self, target: Tensor, start: int, link: Link, offset: int, nbytes: int) -> None:
        futex.copy(target.data_ptr() + start, link.window.address + offset, nbytes)

    def lend(self, link: Link, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        return self._views.of(link.rank, link.window, offset, nbytes, dtype)

    def put(self, link: Link, offset: int, source: Tensor) -> None:
        nbytes = source.nbytes
        if nbytes > _BY_ADDRESS:
            self._views.of(link.rank, link.window, offset, nbytes, source.dtype).copy_(source)
        elif nbytes:
            futex.copy(link.window.address + offset, source.data_ptr(), nbytes)

    def was_put(self, link: Link, source: Tensor) -> bool:
        return False

    def mark_sent(self, link: Link, number: int) -> None:
        pass

    after_sent = mark_consumed = after_consumed = mark_sent

    def mark_exposed(self) -> None:
        pass

    def after_exposed(self, link: Link) -> None:
        pass
