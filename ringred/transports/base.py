"""The seam between the executor and whatever moves bytes.

A transport connects `size` ranks by reliable, ordered channels, one for each ordered pair. It knows nothing of
algorithms. One thread at a time drives it. All memory is 1-D, contiguous tensors.

A rank never sends to itself.

The order of calls is the whole protocol: the n-th `isend` of p to q meets the n-th `irecv` of q from p. Both
ends derive that order from one schedule, so messages carry no addresses; they carry the contract of the
collective that they belong to, so that two ranks in different collectives find out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "UNSETTLED_SECONDS",
    "Counters",
    "Fault",
    "FaultKind",
    "Gather",
    "Request",
    "Transport",
    "Windowed",
    "mixed",
]

Request: TypeAlias = Any
"""A pending send or receive; only the transport that gave it out looks inside."""


UNSETTLED_SECONDS = 2.0
"""How long a rank that closes waits for word from its peers, where messages are not acknowledged."""

_64_BITS = (1 << 64) - 1

Gather: TypeAlias = Callable[[str], list[str]]
"""Gives a text of up to 256 bytes to all ranks of a job and returns those of all, by rank. Collective."""


@dataclass(slots=True)
class Counters:
    """What a transport moved. Bytes are payload; contracts and framing are counted apart."""

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    contract_bytes_sent: int = 0
    contract_bytes_received: int = 0


def mixed(contract: int) -> int:
    """64 bits in which each bit of `contract` counts (splitmix64), for transports that compare fewer than it has:
    two calls that look alike to them do not look alike the next time."""
    value = (contract ^ contract >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


class FaultKind:
    """Why a wait ended without its message."""

    MISMATCH = "mismatch"  # the peer is in another collective
    TIMEOUT = "timeout"  # the deadline passed
    PEER = "peer"  # the peer's end is gone
    ABORTED = "aborted"  # some rank called `abort`


class Fault(Exception):
    """A wait failed. `peer` is the other end, or the rank that aborted, or −1 where it is unknown."""

    def __init__(self, kind: str, peer: int, detail: str = "") -> None:
        super().__init__(f"{kind}, rank {peer}: {detail}")
        self.kind, self.peer, self.detail = kind, peer, detail


class Transport(Protocol):
    """What the executor and the communicator ask of a transport."""

    name: str
    rank: int
    size: int
    counters: Counters
    windows: bool
    """Whether it is `Windowed`."""
    buffers: bool
    """Whether there is room for a segment at least on its way between each two ranks (see `schedule.lower`)."""
    segment_bytes: int
    """The greatest message that pays: above, the executor sends several and overlaps them with folds."""

    def begin(self, contract: int, turn: int) -> None:
        """From here on messages belong to the collective `contract`, 0 ≤ contract < 2^62.

        `turn` counts the collectives of all ranks; it is −1 for what concerns one pair of them. Raises `Fault`
        where it is known by now that a rank aborted; once begun, what has arrived counts, whoever aborts.
        """

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> Request:
        """Sends `src`; never blocks. Done, to `wait`, means that `src` may be overwritten; None is done already.

        `put` says that the receiver, once it has begun the collective, does not touch its destination until it has
        waited for this message: a transport whose peers share windows may write there at once if it sees that it has
        begun. Others ignore it. `buffered` asks
        that the send be done once there is room to copy it; only a transport that `buffers` is asked.
        """

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> Request:
        """Receives what is like `dst` in length and dtype: into `dst`, or, if `lend`, into memory that `wait`
        lends until `release`. Never blocks. At most one loan of each peer is held at a time."""

    def wait(self, request: Request, deadline: float) -> Tensor | None:
        """Blocks in the kernel, without the GIL, until `request` is done; drives all that is pending meanwhile.

        Returns the lent view of a lending receive. Raises `Fault` at `deadline` (of `time.monotonic`), when
        the peer is gone or in another collective, and when any rank aborted.
        """

    def release(self, request: Request) -> None:
        """Ends the loan of a lending receive."""

    def settle(self, deadline: float) -> None:
        """Called once, before `close`: returns when the peers have received all that this rank has sent to them.

        Raises `Fault` as `wait` does. Where nothing tells a sender that its message was received, it returns when the
        peers are closing too, or after `UNSETTLED_SECONDS`.
        """

    def abort(self, report: str) -> None:
        """Publishes this rank's report and makes every wait on every rank raise, now and for ever. Never raises."""

    def reports(self, timeout: float) -> dict[int, str]:
        """The reports of all ranks that aborted, after at most `timeout` seconds of waiting for the rest."""

    def subset(self, members: Sequence[int], key: str) -> Transport:
        """A transport of its own among `members` (ranks of this one, in order); called by all of them with a
        `key` that they share with no other subset."""

    def close(self) -> None:
        """Gives back all that it holds; a second call does nothing. Called by every rank, in any order."""


class Windowed(Transport, Protocol):
    """A transport whose peers read and write each other's memory where that lies in a window."""

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor in this rank's window, uninitialised; its memory is free again when nobody holds it."""

    def holds(self, memory: Tensor) -> bool:
        """Whether `memory` lies in this rank's window."""

    def expose(self, memory: Tensor | None) -> None:
        """Says where the memory of the collective that began lies: for puts, at the same distance from its start
        on every rank. None where puts are of no use in it."""
