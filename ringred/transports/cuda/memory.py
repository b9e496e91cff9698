"""Device memory of one rank that its peers open: chunks, and blocks within them.

An offset is 2^38 times the number of a chunk plus the place in it. A rank's table of chunks, in its window, has their
handles, so that memory can be allocated at any time: a peer opens a chunk when it first comes across its number.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringred.errors import TransportUnavailable
from ringred.transports.cuda.driver import HANDLE_BYTES, Driver, Event, MemberGone, Stream
from ringred.transports.cuda.plane import DevicePlane
from ringred.transports.futex import order
from ringred.transports.links import Layout
from ringred.transports.neighbours import Neighbours
from ringred.transports.windows import Blocks, Window

__all__ = ["DeviceMemory", "PeersUnreachable"]

_CHUNK_BITS = 38
_CHUNKS = 1 << 12  # of one rank
_ENTRY = 8 + HANDLE_BYTES  # bytes of a table's entry: the chunk's length, and its handle
_UNIT = 512  # bytes to which a block is aligned


_kept: list[DeviceMemory] = []  # which peers of a failed communicator may still write to


_NOTICED_SECONDS = 1.0  # within which the end of a process is noticed


class PeersUnreachable(TransportUnavailable):
    """Every rank has its device, and some cannot open the memory of others."""


class _Chunk:
    def __init__(self, number: int, address: int, nbytes: int) -> None:
        self.number, self.address, self.nbytes = number, address, nbytes
        self.blocks = Blocks(nbytes)


class DeviceMemory:
    """The device memory of rank `neighbours.rank`, and that of `members`, all of whom construct it at the same point,
    with a `key` that was used for nothing else; `make` gives the driver of this rank's device.

    Raises `TransportUnavailable` on all of them if one has no driver, or cannot open the memory of another.
    """

    def __init__(
        self, neighbours: Neighbours, members: Sequence[int], make: Callable[[], Driver], key: str, timeout: float
    ) -> None:
        self._neighbours, self._members = neighbours, list(members)
        self.driver: Driver
        self.name: str
        self._lock = threading.Lock()
        self._counting = threading.Lock()  # of the numbers below, and of the streams: never held for long
        self._chunks: list[_Chunk] = []
        self._opened: dict[tuple[int, int], int] = {}
        self._returned: deque[tuple[int, int, Any]] = deque()  # by finalizers, which may run at any time
        self._passing: list[tuple[list[Event], list[tuple[int, int]]]] = []
        self._frozen = self._users = 0
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._window = neighbours.windows[neighbours.rank]
        self._table = neighbours.heap.take(_CHUNKS * _ENTRY)
        try:
            trouble = self._begun(make)
            self._tables = self._exchanged(f"{key}: tables", self._table, timeout)
            self.agree(f"{key}: drivers", trouble, timeout)
            self.agree(f"{key}: peers", self._try_peers(), timeout, PeersUnreachable)
        except (OSError, TransportUnavailable) as failure:
            neighbours.heap.give_back(self._table, _CHUNKS * _ENTRY)
            self._close_opened()
            self._chunks.clear()
            kind = PeersUnreachable if isinstance(failure, PeersUnreachable) else TransportUnavailable
            raise kind(f"rank {neighbours.rank}: {key}: {failure}") from failure

    def _begun(self, make: Callable[[], Driver]) -> str | None:
        """Makes the driver, and a first chunk; why that is not possible, or None."""
        try:
            self.driver = make()
            self.name = self.driver.name
            self._new_chunk(self.driver.chunk_bytes)
        except Exception as failure:  # whatever a driver may raise, the others hear of it
            return f"{failure}" if isinstance(failure, TransportUnavailable) else f"{failure!r}"
        return None

    def _exchanged(self, key: str, number: int, timeout: float) -> dict[int, int]:
        return self._neighbours.exchange(self._members, key, number, timeout)

    def agree(
        self,
        key: str,
        trouble: str | None,
        timeout: float,
        kind: type[TransportUnavailable] = TransportUnavailable,
    ) -> None:
        """Raises `TransportUnavailable`, of this kind, on all if one of them has trouble."""
        refused = [member for member, fine in self._exchanged(key, trouble is None, timeout).items() if not fine]
        if refused:
            raise kind(trouble or f"rank {refused[0]} cannot, and says why")

    def _try_peers(self) -> str | None:
        """Why this rank cannot open the memory of others, or None."""
        for member in self._members:
            if member != self._neighbours.rank:
                try:
                    self.address(member, 0)
                except RuntimeError as failure:
                    return f"that of rank {member} cannot be opened: {failure}"
        return None

    def plane(self, window: Window, block: int, layout: Layout) -> DevicePlane:
        """The plane of a transport with its control block there."""
        plane = DevicePlane(self, window, block, layout)
        with self._counting:
            self._streams.add(plane.stream)
            self._users += 1
        return plane

    def forget(self, stream: Stream) -> None:
        """Blocks do not wait for this stream any more."""
        with self._counting:
            self._streams.discard(stream)

    def let_go(self, slots: Sequence[tuple[int, int]] | None) -> None:
        """Removes one plane, with its blocks of slots; None if peers may still look at this memory, which then is kept
        for ever. After the last plane the peers' memory is closed, and each own chunk freed once no tensor lies in
        it."""
        with self._counting:
            self._users -= 1
            left = self._users
        if slots is None:
            _kept.append(self)
        elif left:
            for block in slots:
                self.give_back(*block)
        elif self not in _kept:
            self._close_opened()
            self._chunks.clear()
            self._returned.clear()
            self._passing.clear()

    def _close_opened(self) -> None:
        for opened in self._opened.values():
            self.driver.close(opened)
        self._opened.clear()

    # ------------------------------------------------------------------ this rank's own

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor, uninitialised; its memory is used again when nobody holds it and the streams are done."""
        nbytes = elements * dtype.itemsize
        if not nbytes:
            return self.driver.tensor(0, 0, dtype, None)
        offset = self.take(nbytes)
        owner = _Owner(self._chunks[offset >> _CHUNK_BITS])
        program = self.driver.program()  # as torch has it, a tensor is used on the stream on which it was made
        weakref.finalize(owner, self._returned.append, (offset, nbytes, program)).atexit = False
        return self.driver.tensor(self.address(None, offset), nbytes, dtype, owner)

    def take(self, nbytes: int) -> int:
        """The offset of a new block. Raises `RuntimeError` if the device has no room."""
        need = -(-nbytes // _UNIT) * _UNIT
        with self._lock:
            self._reclaim()
            for chunk in self._chunks:
                start = chunk.blocks.take(need, _UNIT)
                if start >= 0:
                    return chunk.number << _CHUNK_BITS | start
            chunk = self._new_chunk(max(need, self.driver.chunk_bytes))
            return chunk.number << _CHUNK_BITS | chunk.blocks.take(need, _UNIT)

    def give_back(self, offset: int, nbytes: int) -> None:
        """Frees a block once all streams have done what is enqueued now."""
        self._returned.append((offset, nbytes, None))

    def _new_chunk(self, nbytes: int) -> _Chunk:
        number = len(self._chunks)
        if number >= _CHUNKS:
            raise RuntimeError(f"expected at most {_CHUNKS} chunks of device memory")
        address = self.driver.allocate(nbytes)
        handle = self.driver.export(address).ljust(HANDLE_BYTES, b"\0")
        at = self._table + number * _ENTRY
        self._window.memory[at : at + _ENTRY] = nbytes.to_bytes(8, "little") + handle
        order()  # a descriptor that tells of it is written later
        self._chunks.append(_Chunk(number, address, nbytes))
        weakref.finalize(self._chunks[-1], self.driver.free, address).atexit = False
        return self._chunks[-1]

    def _reclaim(self) -> None:
        """Frees blocks that were given back, and whose streams have passed the point at which this was noticed."""
        while not self._frozen and self._passing and all(event.done() for event in self._passing[0][0]):
            for offset, nbytes in self._passing.pop(0)[1]:
                start = offset & (1 << _CHUNK_BITS) - 1
                blocks = self._chunks[offset >> _CHUNK_BITS].blocks
                blocks.give_back(start, start + -(-nbytes // _UNIT) * _UNIT)
        if self._returned and not self._frozen:
            noticed = [self._returned.popleft() for _ in range(len(self._returned))]
            with self._counting:
                streams = list(self._streams)
            points = [stream.record() for stream in streams]
            points += [self.driver.point(program) for program in {p for _, _, p in noticed if p is not None}]
            self._passing.append((points, [(offset, nbytes) for offset, nbytes, _ in noticed]))

    def freeze(self) -> None:
        """From here on no block is freed: a peer may still write to memory that was exposed to it."""
        with self._counting:
            self._frozen += 1

    def thaw(self) -> None:
        """Ends one `freeze`."""
        with self._counting:
            self._frozen -= 1

    def offset(self, address: int) -> int:
        """The offset of memory at an address; −1 if it is not of these chunks."""
        for chunk in self._chunks:
            if chunk.address <= address < chunk.address + chunk.nbytes:
                return chunk.number << _CHUNK_BITS | address - chunk.address
        return -1

    # ------------------------------------------------------------------ everybody's

    def address(self, member: int | None, offset: int) -> int:
        """The address here of an offset in the memory of a member, or of this rank (None)."""
        number, place = offset >> _CHUNK_BITS, offset & (1 << _CHUNK_BITS) - 1
        if member is None:
            return self._chunks[number].address + place
        opened = self._opened.get((member, number))
        if opened is None:
            opened = self._opened[member, number] = self._open(member, number)
        return opened + place

    def within(self, member: int, offset: int, nbytes: int) -> bool:
        """Whether the member has a chunk with these bytes."""
        if offset >> _CHUNK_BITS >= _CHUNKS:  # nowhere
            return False
        length, _ = self._entry(member, offset >> _CHUNK_BITS)
        return (offset & (1 << _CHUNK_BITS) - 1) + nbytes <= length

    def _entry(self, member: int, number: int) -> tuple[int, bytes]:
        at = self._tables[member] + number * _ENTRY
        entry = self._neighbours.windows[member].memory[at : at + _ENTRY]
        return int.from_bytes(entry[:8], "little"), entry[8:]

    def _open(self, member: int, number: int) -> int:
        length, handle = self._entry(member, number)
        try:
            return self.driver.open(handle, length)
        except RuntimeError as failure:
            if not self._neighbours.has_gone(member, _NOTICED_SECONDS):
                raise
            raise MemberGone(self._neighbours.gone[member]) from failure


class _Owner:
    """Kept by a tensor and its views; when it goes, the block is free."""

    def __init__(self, chunk: _Chunk) -> None:
        self._chunk = chunk
