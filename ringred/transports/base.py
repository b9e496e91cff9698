"""The interface between the executor and the transports, which move bytes.

A transport connects `size` ranks by reliable, ordered channels, one for each ordered pair. It knows nothing of
algorithms. One thread at a time drives it. All memory is 1-D, contiguous tensors.

A rank never sends to itself.

Messages are matched by call order alone: the n-th `isend` of p to q matches the n-th `irecv` of q from p. Both
ends derive that order from the same schedule, so messages carry no addresses. They carry the contract of their
collective, so that two ranks in different collectives detect it.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "SETTLING_SECONDS",
    "UNSETTLED_SECONDS",
    "Counters",
    "Fault",
    "FaultKind",
    "Gather",
    "Player",
    "Queue",
    "Request",
    "Tape",
    "Transport",
    "Windowed",
    "mixed",
]

Request: TypeAlias = Any
"""A pending send or receive; only the transport that gave it out looks inside."""


SETTLING_SECONDS = 0.05  # after which a rank that closes looks whether its peers are closing too
UNSETTLED_SECONDS = 2.0
"""How long a rank that closes waits for word from its peers, where messages are not acknowledged."""

_64_BITS = (1 << 64) - 1

Gather: TypeAlias = Callable[[str], list[str]]
"""Sends a text of up to 256 bytes to all ranks of a job and returns the texts of all, by rank. Collective."""


class _Word:
    """An attribute that lies in one of its object's `words`."""

    def __init__(self, at: int) -> None:
        self._at = at

    def __get__(self, holder: Counters, kind: object = None) -> int:
        return holder.words[self._at]

    def __set__(self, holder: Counters, value: int) -> None:
        holder.words[self._at] = value


class Counters:
    """What a transport moved. Bytes are payload; contracts and framing are counted apart.

    The numbers are `words` at an `address`, to which the compiled player adds."""

    __slots__ = ("address", "words")

    messages_sent = _Word(0)
    bytes_sent = _Word(1)
    messages_received = _Word(2)
    bytes_received = _Word(3)
    contract_bytes_sent = _Word(4)
    contract_bytes_received = _Word(5)

    def __init__(self) -> None:
        self.words = array("q", bytes(48))
        self.address, _ = self.words.buffer_info()

    def __add__(self, other: Counters) -> Counters:
        both = Counters()
        for at, words in enumerate(zip(self.words, other.words, strict=True)):
            both.words[at] = sum(words)
        return both


class Tape:
    """A plan's instructions as numbers, `words` (runtime/tape.py), with what the player notes while it plays them.

    `exposed` are the bounds, as addresses, of the memory into which peers may put; `moved` the messages and bytes that
    it sends and receives, `sends` whether it sends any bytes; `timed` how many instructions are timed; `element` the
    bytes of one.
    """

    __slots__ = ("address", "element", "requests", "sends", "timed", "words")

    # Words before the instructions, as in native/layout.h.
    PLAYING, DEADLINE, FAULT_LINK, EXPECTED, GOT, HEAD = 9, 10, 13, 14, 15, 16
    REQUEST_WORDS = 12

    def __init__(
        self,
        words: list[int],
        requests: int,
        exposed: tuple[int, int],
        moved: tuple[int, int, int, int],
        timed: int,
        element: int,
    ) -> None:
        self.requests = array("q", bytes(8 * self.REQUEST_WORDS * max(1, requests)))
        head = [0, self.requests.buffer_info()[0], requests, *exposed, *moved]
        self.words = array("q", [*head, *[0] * (self.HEAD - len(head)), *words])
        self.address = self.words.buffer_info()[0]
        self.sends, self.timed, self.element = moved[1] > 0, timed, element


class Player(Protocol):
    """Plays tapes over its transport, in one call without the GIL."""

    links: Mapping[int, int]
    """The number of the link to each peer."""

    def ready(self) -> bool:
        """Whether nothing is under way that it does not know of."""

    def recall(self, *how: Any) -> Any:
        """A memory of calls, which plays their tapes again; see runtime/recall.py."""

    def drop(self, tape: Tape) -> None:
        """Forgets where a tape was that is not played to its end."""

    def play(self, tape: Tape, contract: int, timeout_ns: int, times: array[int] | None) -> None:
        """Begins the collective `contract` as `Transport.begin` does, exposes memory as `Windowed.expose` does, and
        plays `tape`. `times` get, for each fold and take, when it began to wait, had its data and ended, in ns. Raises
        `Fault` as `Transport.wait` does."""


def mixed(contract: int) -> int:
    """A 64-bit hash of `contract` (splitmix64), for transports that compare fewer bits than a contract has: if two
    different calls collide once, they do not collide the next time."""
    value = (contract ^ contract >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


class FaultKind:
    """Why a wait ended without its message."""

    MISMATCH = "mismatch"  # the peer is in another collective
    TIMEOUT = "timeout"  # the deadline passed
    PEER = "peer"  # the peer's end is gone
    ABORTED = "aborted"  # some rank called `abort`
    UNRECEIVED = "unreceived"  # the peer is closing, and has not received what this rank sent


class Fault(Exception):
    """A wait failed. `peer` is the other end, or the rank that aborted, or −1 where it is unknown."""

    def __init__(self, kind: str, peer: int, detail: str = "") -> None:
        super().__init__(f"{kind}, rank {peer}: {detail}")
        self.kind, self.peer, self.detail = kind, peer, detail


class Queue(Protocol):
    """Where a transport whose memory is a device's puts what is to be done there, one thing after the other."""

    def here(self) -> Any:
        """What the calling thread's program has enqueued on its current stream so far, to be given to `following`."""

    def following(self, point: Any) -> AbstractContextManager[None]:
        """What is done within it comes after `point`, torch's own operations too."""

    def record(self) -> Any:
        """The point after all that was put here so far."""

    def precede(self, point: Any) -> bool:
        """Makes what the calling thread's program enqueues next come after `point`. False if it does its next operation
        itself, and has to wait."""

    def share(self, tensor: Tensor, point: Any) -> None:
        """A tensor that was made within `following(point)` is used on the program's stream of that point."""

    def over(self, address: int, nbytes: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor over memory of the device, which it does not keep."""

    def fold(
        self, kernel: Any, out: Tensor, operands: Sequence[Tensor], final: bool, peers: Sequence[int] = ()
    ) -> None:
        """Folds as `kernel`, a `Folder`, does. `out` is sent to `peers` next, with `put`: it may be put there now."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies a flat tensor to another."""


class Transport(Protocol):
    """What the executor and the communicator ask of a transport."""

    name: str
    model: str
    """The name whose costs count: that of ranks with neighbours on their host, for all ranks of a job."""
    rank: int
    size: int
    counters: Counters
    windows: bool
    """Whether it is `Windowed`."""
    buffers: bool
    """Whether at least one segment can be buffered between every two ranks (see `schedule.lower`)."""
    segment_bytes: int
    """The greatest useful message: the executor splits a larger one, and overlaps the parts with folds."""
    depth: int
    """How many segments are worth having under way to a peer; the same for all ranks of a job. See `schedule.lower`."""

    @property
    def player(self) -> Player | None:
        """Plays compiled plans, where there is such a thing."""

    @property
    def queue(self) -> Queue | None:
        """What does all that is done to memory; None if that is done at once, by whoever calls."""

    def passed(self, point: Any, deadline: float, hurry: threading.Event | None = None) -> None:
        """Returns once all before `point` of the queue is done; with `hurry`, somewhat later while that is not set.
        Raises `Fault` as `wait` does. Any thread calls it, while another drives the transport."""

    def begin(self, contract: int, turn: int) -> None:
        """From here on messages belong to the collective `contract`, 0 ≤ contract < 2^62.

        `turn` counts the collectives of all ranks; it is −1 for messages between one pair of ranks. Raises `Fault` if
        it is already known that a rank aborted. Once it has begun, messages that have arrived are still delivered,
        even if a rank aborts.
        """

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> Request:
        """Sends `src`; never blocks. The request is done once `src` may be overwritten; None is done already.

        `put` promises that the receiver, once it has begun the collective, does not touch its destination until it
        has waited for this message. A transport whose ranks share windows may then write there at once, if it sees
        that the receiver has begun; others ignore it. `buffered` asks that the send be done once there is room to copy
        `src`; it is only used with a transport that `buffers`.
        """

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> Request:
        """Receives a message of the length and dtype of `dst`: into `dst`, or, if `lend`, into memory of the transport,
        which `wait` returns and which is valid until `release`. Never blocks. At most one such loan per peer is held
        at a time."""

    def wait(self, request: Request, deadline: float) -> Tensor | None:
        """Blocks in the kernel, without the GIL, until `request` is done; other pending requests progress meanwhile.

        Returns the lent view of a lending receive. Raises `Fault` at `deadline` (of `time.monotonic`), when
        the peer is gone or in another collective, and when any rank aborted.
        """

    def release(self, request: Request) -> None:
        """Ends the loan of a lending receive."""

    def settle(self, deadline: float) -> None:
        """Called once, before `close`: returns when the peers have received all that this rank has sent to them.

        Raises `Fault` as `wait` does, and `UNRECEIVED` where a peer closes without receiving. Where nothing tells a
        sender that its message was received, it returns when the peers are closing too, or after `UNSETTLED_SECONDS`.
        """

    def abort(self, report: str) -> None:
        """Publishes this rank's report and makes every wait on every rank raise, now and for ever. Never raises."""

    def reports(self, timeout: float) -> dict[int, str]:
        """The reports of all ranks that aborted, after at most `timeout` seconds of waiting for the rest."""

    def subset(self, members: Sequence[int], key: str) -> Transport:
        """A new transport among `members` (ranks of this one, in order). All of them call it, with the same `key`,
        which no other subset uses."""

    def close(self) -> None:
        """Gives back all that it holds; a second call does nothing. Called by every rank, in any order."""


class Windowed(Transport, Protocol):
    """A transport whose ranks can read and write each other's memory if it lies in a window."""

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor in this rank's window, uninitialised; its memory is free again when nobody holds it."""

    def holds(self, memory: Tensor) -> bool:
        """Whether `memory` lies in this rank's window."""

    def expose(self, memory: Tensor | None) -> None:
        """Tells the peers where this rank's memory for the current collective begins, so that they can put into it: a
        put goes to the same offset from there on every rank. None if the collective has no use for puts."""
