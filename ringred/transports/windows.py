"""Windows: anonymous memory of a process that its peers map too, and the heap in it.

A window is a `memfd`: it never has a file name, so it cannot be left behind or confused with another one, and
the size of /dev/shm does not matter. It is as large as the machine's memory and sparse: a page costs nothing until
it is touched, and freed blocks give their pages back. So memory can be allocated at any time without telling the
peers, which mapped the whole window at the start.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from bisect import bisect_left
from collections import deque
from typing import Any

import torch
from torch import Tensor

__all__ = ["Blocks", "Heap", "Views", "Window", "adopt", "create"]

_VIEWS = 4096  # views that are kept
_LINE = 64  # bytes of a cache line
_PAGE = mmap.PAGESIZE
_ADDRESSES = 1 << 46  # bytes of address space that all windows of a host may take together
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_live: weakref.WeakSet[Heap] = weakref.WeakSet()


class Window:
    """One rank's window as this process maps it: `address` is where it begins here, `words` its 64-bit words."""

    def __init__(self, memory: mmap.mmap) -> None:
        with contextlib.suppress(OSError):  # a crash need not write the machine's memory once for each window
            memory.madvise(mmap.MADV_DONTDUMP)
        self.memory = memory
        self.nbytes = len(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.words: memoryview[int] = memoryview(memory).cast("B").cast("Q")

    def view(self, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """`nbytes` bytes from `offset` on as elements of `dtype`."""
        return torch.frombuffer(self.memory, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset)


class Views:
    """Tensors over parts of windows, kept for the next time: making one takes microseconds."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int, torch.dtype], Tensor] = {}

    def of(self, rank: int, window: Window, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """As `window.view`; the window is that of `rank`."""
        key = (rank, offset, nbytes, dtype)
        view = self._kept.get(key)
        if view is None:
            if len(self._kept) >= _VIEWS:
                self._kept.clear()
            with torch.inference_mode(False):  # it may be written to outside of it
                view = self._kept[key] = window.view(offset, nbytes, dtype)
        return view


def create(sharers: int) -> tuple[int, Window]:
    """A new window, and the descriptor to pass to the others of `sharers` ranks. Raises `OSError`."""
    total = os.sysconf("SC_PHYS_PAGES") * _PAGE
    nbytes = min(total, _ADDRESSES // sharers) // _PAGE * _PAGE
    descriptor = os.memfd_create("ringred", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return descriptor, Window(mmap.mmap(descriptor, nbytes))
    except BaseException:
        os.close(descriptor)
        raise


def adopt(descriptor: int) -> Window:
    """A peer's window, by the descriptor that it passed. Raises `OSError` unless its size is fixed for good."""
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if seals & _SEALS != _SEALS:
        raise OSError("a peer passed memory that it might still shrink")
    return Window(mmap.mmap(descriptor, os.fstat(descriptor).st_size))


class Blocks:
    """Which parts of `nbytes` bytes are free; blocks are taken first fit."""

    def __init__(self, nbytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # (start, end), ascending, never adjacent

    def take(self, nbytes: int, unit: int) -> int:
        """Where a new block begins, aligned to `unit`, of which `nbytes` is a multiple; −1 if there is no room."""
        for at, (start, end) in enumerate(self._free):
            first = -(-start // unit) * unit
            last = first + nbytes
            if last <= end:
                self._free[at : at + 1] = [gap for gap in ((start, first), (last, end)) if gap[0] < gap[1]]
                return first
        return -1

    def give_back(self, start: int, end: int) -> None:
        """What is there is free again."""
        at = bisect_left(self._free, (start, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start:
            start = self._free.pop(at - 1)[0]
            at -= 1
        self._free.insert(at, (start, end))


class Heap:
    """Allocates blocks of a window, first fit. Each has cache lines of its own; one of a page or more, its own pages.

    Any thread may take and give back.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self._lock = threading.Lock()
        self._blocks = Blocks(window.nbytes)
        self._returned: deque[tuple[int, int]] = deque()  # added by finalizers, which may run even within `take`
        self._freezing = threading.RLock()  # a finalizer that gives back may run while it is held
        self._frozen = 0  # number of `freeze` calls without their `thaw`
        self._held_back: list[tuple[int, int]] = []
        _live.add(self)

    def take(self, nbytes: int) -> int:
        """The offset of a new block, whose bytes are zero if it has a page or more. Raises `MemoryError`."""
        unit = _PAGE if nbytes >= _PAGE else _LINE
        needed = max(1, -(-nbytes // unit)) * unit
        with self._lock:
            while self._returned:
                self._blocks.give_back(*self._returned.popleft())
            first = self._blocks.take(needed, unit)
        if first < 0:
            raise MemoryError(f"the window of {self.window.nbytes} bytes has no room for {nbytes} more")
        if unit == _PAGE:
            self.window.memory.madvise(mmap.MADV_REMOVE, first, needed)  # zeroes what small blocks left
        return first

    def give_back(self, offset: int, nbytes: int) -> None:
        """Frees the block of `nbytes` bytes at `offset`; the pages that it filled go back to the system."""
        with self._freezing:
            if self._frozen:
                self._held_back.append((offset, nbytes))
                return
        unit = _PAGE if nbytes >= _PAGE else _LINE
        end = offset + max(1, -(-nbytes // unit)) * unit
        if unit == _PAGE:
            self.window.memory.madvise(mmap.MADV_REMOVE, offset, end - offset)
        self._returned.append((offset, end))

    def freeze(self) -> None:
        """From here on no block is freed: a peer may still write to memory that was exposed to it."""
        with self._freezing:
            self._frozen += 1

    def thaw(self) -> None:
        """Ends one `freeze`; after the last one, the blocks that were held back are freed."""
        with self._freezing:
            self._frozen -= 1
            if self._frozen:
                return
            freed, self._held_back = self._held_back, []
        for offset, nbytes in freed:
            self.give_back(offset, nbytes)

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor in a block of its own, which is free again once its memory is no longer used."""
        nbytes = elements * dtype.itemsize
        if not nbytes:
            return torch.empty(0, dtype=dtype)
        offset = self.take(nbytes)
        block: Any = (ctypes.c_char * nbytes).from_buffer(self.window.memory, offset)
        # The tensor's storage, which all its views share, keeps the block alive.
        weakref.finalize(block, self.give_back, offset, nbytes).atexit = False
        return torch.frombuffer(block, dtype=dtype)


def _freeze_all() -> None:
    for heap in list(_live):
        heap.freeze()


# A forked child shares the memory, and must not give back what its parent uses.
os.register_at_fork(after_in_child=_freeze_all)
