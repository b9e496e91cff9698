"""The sending half of `shm`: small and large slots, descriptors, and puts into the receiver's window."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from ringred.transports import futex
from ringred.transports.base import Counters
from ringred.transports.futex import fence, order
from ringred.transports.links import (
    ACKED,
    AT,
    AWAITED,
    COUNTERS,
    ENTRIES,
    EXPOSED,
    EXPOSED_AT,
    EXPOSED_CONTRACT,
    EXPOSED_END,
    KIND_BITS,
    LENGTH,
    NOWHERE,
    NUMBER,
    OWN_CONTRACT,
    PART,
    PLACE,
    PUT,
    QUEUED,
    SENT,
    SLEEPING,
    SMALL_BYTES,
    SMALL_SLOTS,
    SMALL_STRIDE,
    Link,
    Send,
    State,
)
from ringred.transports.planes import Plane
from ringred.transports.windows import Window

__all__ = ["SPIN_NS", "Sender", "gives_way_ns"]

SPIN_NS = 20_000
"""How long a rank that has a core of its own looks again and again before it sleeps."""
_TURN_NS = 50_000


def gives_way_ns(ranks: int, cores: int) -> int:
    """How long a rank that shares its core looks, and gives way between looks, before it sleeps: until the others of
    the core have had a few turns. 0 where each has a core."""
    return _TURN_NS * -(-ranks // cores) if ranks > cores else 0


class Sender:
    """Sends what one rank has for its peers; the rank's control block is at offset `block` of its `window`.

    `gives_way` is not 0 where a rank that waits gives way.
    """

    def __init__(
        self,
        window: Window,
        block: int,
        links: Mapping[int, Link],
        plane: Plane,
        gives_way: int,
        state: State,
    ) -> None:
        self._links, self._plane, self._gives_way = links, plane, gives_way
        self._own = state.own
        self._words, self._at = window.words, block // 8
        self.counters = Counters()
        self._contract = 0

    @property
    def queued(self) -> int:
        """Sends without a descriptor or a slot yet."""
        return self._own[QUEUED]

    def received(self, nbytes: int) -> None:
        """Counts a message."""
        words = self._counters.words
        words[2] += 1
        words[3] += nbytes

    @property
    def counters(self) -> Counters:
        """What was sent and received, here and by the compiled player."""
        return self._counters

    @counters.setter
    def counters(self, value: Counters) -> None:
        self._counters, self._own[COUNTERS] = value, value.address

    def begin(self, contract: int) -> None:
        self._contract = self._own[OWN_CONTRACT] = contract

    def expose(self, memory: Tensor | None) -> None:
        """Tells the peers where this rank's `memory` of the collective lies, so that they can put into it."""
        offset = -1 if memory is None else self._plane.offset(memory.data_ptr())
        if memory is None or offset < 0:
            self._own[EXPOSED] = self._own[EXPOSED_END] = 0
            self._words[self._at + EXPOSED_AT] = NOWHERE
        else:
            address = memory.data_ptr()
            self._own[EXPOSED], self._own[EXPOSED_END] = address, address + memory.nbytes
            self._words[self._at + EXPOSED_AT] = offset
            self._plane.mark_exposed()
        order()
        self._words[self._at + EXPOSED_CONTRACT] = self._contract

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> Send | None:
        link = self._links[peer]
        nbytes = src.nbytes
        words = self._counters.words  # in fewer steps than by name
        words[0] += 1
        words[1] += nbytes
        there = put and self._plane.was_put(link, src)
        if nbytes <= SMALL_BYTES and not there and not link.queue and self._send_small(link, src, nbytes):
            return None
        request = Send(link, src, nbytes, self._contract)
        address = src.data_ptr()
        if there:
            request.place = PUT
        elif put and nbytes > SMALL_BYTES and (target := self._put_offset(link, address, nbytes)) >= 0:
            # Put it now, while it is in the cache; its descriptor may have to wait for earlier messages.
            self._plane.put(link, target, src)
            request.place = PUT
        elif nbytes > SMALL_BYTES and not buffered and (offset := self._plane.offset(address)) >= 0:
            request.place = offset << KIND_BITS
        if link.queue or not self._start(request):
            link.queue.append(request)
            self._own[QUEUED] += 1
        return request

    def _send_small(self, link: Link, src: Tensor, nbytes: int) -> bool:
        """Sends by a small slot, if there is room now."""
        state, slots = link.state, link.small
        number, slot = state[SENT] + 1, state[slots.next_at]
        used = state[slots.used_at + slot]
        needed = max(number - ENTRIES, used)
        if needed > state[ACKED] and needed > self._refresh(link):
            return False
        self._plane.after_consumed(link, used)
        state[slots.used_at + slot], state[slots.next_at] = number, (slot + 1) % SMALL_SLOTS
        offset = slots.start + slot * SMALL_STRIDE
        self._plane.fill_short(offset, src, nbytes)
        self._post(link, number, self._contract, nbytes, offset << KIND_BITS)
        return True

    def _start(self, request: Send) -> bool:
        """Posts as much of a send as there is room for; returns whether that is all."""
        link, nbytes = request.link, request.nbytes
        state = link.state
        while True:
            number = state[SENT] + 1
            if number - ENTRIES > state[ACKED] and number - ENTRIES > self._refresh(link):
                return False
            if request.place >= 0:
                request.until = 0 if request.place == PUT else number
                self._post(link, number, request.contract, nbytes, request.place)
                return True
            part = min(nbytes - request.done, self._plane.part_bytes)
            offset = self._room(link, number, part)
            if offset < 0:
                return False
            self._plane.fill(offset, request.source, request.done, part)
            request.done += part
            last = request.done == nbytes
            self._post(link, number, request.contract, nbytes, offset << KIND_BITS | (AT if last else PART))
            if last:
                request.until = 0
                return True

    def _room(self, link: Link, number: int, nbytes: int) -> int:
        """Takes slots for a message, or part of one, that gets this `number`: their offset; −1 if
        the peer has not read what was last in them."""
        state, slots = link.state, link.small if nbytes <= SMALL_BYTES else link.large
        if slots.start < 0:
            slots.start = self._plane.take_slots(link.index)
        count = max(1, -(-nbytes // slots.stride))
        first = state[slots.next_at]
        if first + count > slots.count:
            first = 0
        taken = range(slots.used_at + first, slots.used_at + first + count)
        needed = max(state[at] for at in taken)
        if needed > state[ACKED] and needed > self._refresh(link):
            return -1
        self._plane.after_consumed(link, needed)
        for at in taken:
            state[at] = number
        state[slots.next_at] = (first + count) % slots.count
        return slots.start + first * slots.stride

    def _refresh(self, link: Link) -> int:
        """The last message that the peer has finished with."""
        acked = link.state[ACKED] = link.acked_words[link.acked_at]
        order()
        return acked

    def reach(self, peer: int, address: int, nbytes: int) -> int:
        """As `_put_offset`, for whoever has another way to write there."""
        link = self._links.get(peer)
        return -1 if link is None else self._put_offset(link, address, nbytes)

    def _put_offset(self, link: Link, address: int, nbytes: int) -> int:
        """The offset in the peer's data to which a put from `address` goes; −1 if a put is not possible."""
        if not self._own[EXPOSED] <= address < self._own[EXPOSED_END]:
            return -1
        if not self._entered(link):
            return -1
        offset = link.words[link.words_at + EXPOSED_AT] + address - self._own[EXPOSED]
        if not self._plane.within(link, offset, nbytes):
            return -1
        self._plane.after_exposed(link)
        return offset

    def _entered(self, link: Link) -> bool:
        """Whether the peer has begun this collective. The first call for a collective waits a moment for that."""
        words, at = link.words, link.words_at + EXPOSED_CONTRACT
        if words[at] == self._contract:
            order()
            return True
        if link.state[AWAITED] == self._contract:
            return False
        link.state[AWAITED] = self._contract
        patience = time.monotonic_ns() + SPIN_NS
        while words[at] != self._contract:
            if time.monotonic_ns() >= patience:
                return False
            if self._gives_way:
                futex.give_way()
        order()
        return True

    def _post(self, link: Link, number: int, contract: int, nbytes: int, place: int) -> None:
        words, entry = self._words, link.entries_out + (number % ENTRIES) * 4
        self._plane.mark_sent(link, number)
        words[entry] = contract
        words[entry + LENGTH] = nbytes
        words[entry + PLACE] = place
        order()
        words[entry + NUMBER] = number  # written last: the descriptor is now complete
        link.state[SENT] = number
        fence()
        if link.words[link.words_at + SLEEPING]:  # `_wake`, inlined: a call costs a tenth of a small message
            link.rouse()

    def drain(self) -> None:
        """Posts queued sends, in order, as far as there is room now."""
        for link in self._links.values():
            while link.queue and self._start(link.queue[0]):
                link.queue.popleft()
                self._own[QUEUED] -= 1
