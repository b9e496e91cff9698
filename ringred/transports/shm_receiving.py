"""The receiving half of `shm`: descriptors, and data that is read in place, copied from slots, or there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ringred.transports.base import Fault, FaultKind
from ringred.transports.futex import order
from ringred.transports.links import (
    AT,
    CONTRACT,
    ENTRIES,
    KIND_BITS,
    LENGTH,
    NUMBER,
    PART,
    PLACE,
    PUT,
    SEGMENT_BYTES,
    SLOT,
    SLOT_PART,
    TAKEN,
    Link,
    Receive,
)
from ringred.transports.planes import Plane
from ringred.transports.windows import Window

__all__ = ["Receiver"]

Until: TypeAlias = Callable[[Link, memoryview, int, int, float], None]


class Receiver:
    """Receives what the peers of `links` have for one rank, whose control block lies in `window`.

    `until(link, words, at, value, deadline)` waits for a word; `received` counts a message.
    """

    def __init__(
        self,
        window: Window,
        links: Mapping[int, Link],
        plane: Plane,
        until: Until,
        received: Callable[[int], None],
    ) -> None:
        self._words, self._links, self._plane = window.words, links, plane
        self._until, self._received = until, received
        self._contract = 0

    def begin(self, contract: int) -> None:
        self._contract = contract

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> Receive:
        link = self._links[peer]
        request = Receive(link, dst, lend, self._contract)
        link.pending.append(request)
        return request

    def finish(self, request: Receive, deadline: float) -> Tensor | None:
        """As `Transport.wait` for a receive."""
        link = request.link
        while link.pending and request.number == 0 and request.view is None:
            self._take(link, link.pending[0], deadline, wanted=link.pending[0] is request)
            link.pending.popleft()
        return request.view

    def release(self, request: Receive) -> None:
        if request.number > 0:
            self._consume(request.link, request.number)
        request.number, request.view = -1, None

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
            self._plane.after_sent(link, number)
            offset, kind = place >> KIND_BITS, place & (1 << KIND_BITS) - 1
            if kind in (AT, SLOT) and request.lend and not got and wanted and nbytes:
                request.view = self._plane.lend(link, offset, nbytes, dst.dtype)
                request.number = number
                self._received(nbytes)
                return
            if request.lend and staging is None:
                staging = torch.empty_like(dst)
            if kind != PUT and nbytes:
                part = {PART: self._plane.part_bytes, SLOT_PART: SEGMENT_BYTES}.get(kind, nbytes - got)
                self._plane.fetch(dst if staging is None else staging, got, link, offset, part)
                got += part
            self._consume(link, number)
            if kind not in (PART, SLOT_PART):
                request.number, request.view = -1, staging
                self._received(nbytes)
                return

    def _consume(self, link: Link, number: int) -> None:
        order()
        self._plane.mark_consumed(link, number)
        self._words[link.taken_at] = number
        link.wake()
