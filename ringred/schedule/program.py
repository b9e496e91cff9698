"""The instructions that run one rank's schedule: integers only, which the executor binds to memory.

`schedule.lower` makes them, `runtime.executor` runs them, `schedule.cost` predicts their time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

__all__ = ["Fold", "Instruction", "PostReceive", "PostSend", "Program", "Snapshot", "Take", "WaitSent"]


class Snapshot(NamedTuple):
    """Copy the elements `lo:hi` of the buffer to the slots, from element `slot` on."""

    lo: int
    hi: int
    slot: int


class PostSend(NamedTuple):
    """Send `lo:hi` to `peer` as request `request`; from the slots if `slot` is not None.

    `put`: the receiver no longer uses its own copy, so the sender may write directly into its window.
    `buffered`: the send must be done once the transport has copied the data, without waiting for the receiver.
    """

    request: int
    peer: int
    lo: int
    hi: int
    slot: int | None
    put: bool
    buffered: bool
    step: int


class PostReceive(NamedTuple):
    """Post the receive of `lo:hi` from `peer` as `request`: `lend` the arriving data, or else store it in `lo:hi`."""

    request: int
    peer: int
    lo: int
    hi: int
    lend: bool
    step: int


class WaitSent(NamedTuple):
    """Wait until `request` to `peer` no longer reads its source."""

    request: int
    peer: int


class Fold(NamedTuple):
    """Combine `lo:hi` with the data that `requests` lend, from `peers` in rank order; the local value is operand `own`.

    `final`: the result is the complete reduction, and this rank must hold it at the end.
    """

    requests: tuple[int, ...]
    peers: tuple[int, ...]
    own: int
    lo: int
    hi: int
    final: bool
    step: int


class Take(NamedTuple):
    """Wait until `request` from `peer` has replaced `lo:hi`."""

    request: int
    peer: int
    lo: int
    hi: int
    step: int


Instruction: TypeAlias = Snapshot | PostSend | PostReceive | WaitSent | Fold | Take


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of one rank, the number of requests they name, and the elements of slots they need."""

    instructions: tuple[Instruction, ...]
    requests: int
    slot_elements: int
