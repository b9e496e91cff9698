"""Runs any schedule over any transport: binds a program to memory once, then executes it.

The executor knows neither algorithms nor transports. Instructions come from `schedule.lower` in the order in
which they run; here they are bound to tensors. Small tensor calls cost about a microsecond each, so every view is
made when a plan is bound, and code that uses a buffer repeatedly (a gradient bucket) keeps its plan.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor

from ringred.runtime.folds import Folder
from ringred.runtime.tape import compiled
from ringred.runtime.trace import Tracer
from ringred.schedule.program import Fold, PostReceive, PostSend, Program, Snapshot, Take, WaitSent
from ringred.transports.base import Player, Request, Tape, Transport, Windowed

__all__ = ["Piece", "Plan", "bind", "run"]

_SEND, _RECEIVE, _FOLD, _TAKE, _WAIT_SENT, _SNAPSHOT = range(6)


class Piece(NamedTuple):
    """The 1-D contiguous `tensor` holds the elements of a collective's address space from `lo` on."""

    lo: int
    tensor: Tensor


@dataclass(slots=True)
class Plan:
    """A program bound to memory: each operation as a tuple of its code, its request numbers and its views."""

    operations: tuple[tuple[Any, ...], ...]
    requests: int
    folder: Folder | None
    exposed: Tensor | None = None
    """The tensor that holds all the data, if there is only one and peers may write into it (puts); else None."""
    own_bytes: int = 0
    """Bytes of memory that the plan allocated for itself."""
    tape: Tape | None = None
    """The operations in the form that the transport's player plays, once they were played."""
    by_hand: bool = False
    """Whether the player does not have what the plan needs."""
    puts: dict[int, tuple[int, ...]] | None = None
    """What `_puts` finds, where there is a queue."""

    def surround(self, before: Iterable[tuple[Tensor, Tensor]], after: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copies between flat tensors, (target, source), at the beginning and at the end."""
        first, last = (tuple((_SNAPSHOT, *pair) for pair in pairs) for pairs in (before, after))
        self.operations = (*first, *self.operations, *last)


def bind(
    program: Program,
    pieces: Sequence[Piece],
    folder: Folder | None,
    slots: Tensor | None = None,
    exposed: Tensor | None = None,
) -> Plan:
    """Binds `program` to the memory in `pieces`, which are in ascending order of `lo` and do not overlap.

    `slots` is memory for `program.slot_elements` elements, if the transport needs it in a certain place.
    """
    starts = [piece.lo for piece in pieces]
    views: dict[tuple[int, int], Tensor] = {}

    def view(lo: int, hi: int) -> Tensor:
        found = views.get((lo, hi))
        if found is None:
            piece = pieces[max(bisect_right(starts, lo) - 1, 0)]
            assert hi - piece.lo <= piece.tensor.numel(), f"elements {lo}:{hi} lie in no one piece"
            found = views[lo, hi] = piece.tensor[lo - piece.lo : hi - piece.lo]
        return found

    if slots is None:
        slots = pieces[0].tensor.new_empty(program.slot_elements)
    operations: list[tuple[Any, ...]] = []
    for op in program.instructions:
        if isinstance(op, PostSend):
            lo, hi = op.lo, op.hi
            source = view(lo, hi) if op.slot is None else slots[op.slot : op.slot + hi - lo]
            operations.append((_SEND, op.request, op.peer, source, op.put, op.buffered))
        elif isinstance(op, PostReceive):
            operations.append((_RECEIVE, op.request, op.peer, view(op.lo, op.hi), op.lend))
        elif isinstance(op, Fold):
            operations.append((_FOLD, op.requests, view(op.lo, op.hi), op.own, op.final, op.step, op.peers))
        elif isinstance(op, Take):
            operations.append((_TAKE, op.request, op.step, op.peer))
        elif isinstance(op, WaitSent):
            operations.append((_WAIT_SENT, op.request))
        elif isinstance(op, Snapshot):
            operations.append((_SNAPSHOT, slots[op.slot : op.slot + op.hi - op.lo], view(op.lo, op.hi)))
    return Plan(tuple(operations), program.requests, folder, exposed, slots.nbytes)


def run(
    plan: Plan, transport: Transport, contract: int, turn: int, timeout_ns: int, tracer: Tracer | None = None
) -> None:
    """Runs `plan` over `transport` as the collective `contract`, see `Transport.begin`, in at most `timeout_ns`. With a
    queue, all is enqueued then, and not done.

    Raises `Fault` like `Transport.wait`; after that the transport is unusable.
    """
    player = transport.player
    if player is not None and player.ready() and _played(plan, player, contract, timeout_ns, tracer):
        return
    transport.begin(contract, turn)
    if transport.windows:
        cast(Windowed, transport).expose(plan.exposed)
    deadline = time.monotonic() + timeout_ns / 1e9
    requests: list[Request] = [None] * plan.requests
    isend, irecv, wait, release = transport.isend, transport.irecv, transport.wait, transport.release
    folder, queue = plan.folder, transport.queue
    if queue is not None and plan.puts is None:
        plan.puts = _puts(plan.operations)
    puts = plan.puts or {}
    for operation in plan.operations:
        code = operation[0]
        if code == _SEND:
            _, request, peer, source, put, buffered = operation
            requests[request] = isend(peer, source, put, buffered)
        elif code == _RECEIVE:
            _, request, peer, destination, lend = operation
            requests[request] = irecv(peer, destination, lend)
        elif code == _FOLD:
            _, numbers, own_view, own, final, step, peers = operation
            began = time.monotonic_ns() if tracer is not None else 0
            if len(numbers) == 1:
                lent: Any = wait(requests[numbers[0]], deadline)
                operands = (own_view, lent) if own == 0 else (lent, own_view)
            else:
                several: list[Any] = [wait(requests[number], deadline) for number in numbers]
                operands = (*several[:own], own_view, *several[own:])
            arrived = time.monotonic_ns() if tracer is not None else 0
            assert folder is not None, "only reducing collectives fold"
            if queue is None:
                folder(own_view, operands, final)
            else:
                queue.fold(folder, own_view, operands, final, puts.get(numbers[0], ()))
            for number in numbers:
                release(requests[number])
                requests[number] = None
            if tracer is not None:
                tracer.span("wait", f"step {step}: from {peers}", began, arrived)
                tracer.span("fold", f"step {step}: fold", arrived, time.monotonic_ns())
        elif code == _TAKE:
            began = time.monotonic_ns() if tracer is not None else 0
            wait(requests[operation[1]], deadline)
            if tracer is not None:
                name = f"step {operation[2]}: from {operation[3]}"
                tracer.span("wait", name, began, time.monotonic_ns())
        elif code == _WAIT_SENT:
            if requests[operation[1]] is not None:
                wait(requests[operation[1]], deadline)
        elif queue is not None:
            queue.copy(operation[1], operation[2])
        else:
            operation[1].copy_(operation[2])


def _puts(operations: Sequence[tuple[Any, ...]]) -> dict[int, tuple[int, ...]]:
    """By the first request of each fold, the peers to which its whole result is put before anything else is waited for:
    one pass over memory can fold and put."""
    found: dict[int, tuple[int, ...]] = {}
    folded: tuple[Any, ...] | None = None
    for operation in operations:
        if operation[0] == _FOLD:
            folded = operation
        elif operation[0] == _SEND and folded is not None:
            _, _, peer, source, put, _ = operation
            if put and source is folded[2]:
                first = folded[1][0]
                found[first] = (*found.get(first, ()), peer)
        elif operation[0] != _RECEIVE:
            folded = None
    return found


def _played(plan: Plan, player: Player, contract: int, timeout_ns: int, tracer: Tracer | None) -> bool:
    """Whether `player` ran the plan."""
    tape = plan.tape
    if tape is None:
        if not plan.by_hand:
            tape = plan.tape = compiled(plan.operations, plan.requests, plan.folder, plan.exposed, player.links)
        if tape is None:
            plan.by_hand = True
            return False
    if tracer is None:
        player.play(tape, contract, timeout_ns, None)
        return True
    times = array("q", bytes(24 * tape.timed))
    player.play(tape, contract, timeout_ns, times)
    at = 0
    for operation in plan.operations:
        if operation[0] == _FOLD:
            _, _, _, _, _, step, peers = operation
            if times[at]:  # else it was done before the trace began
                tracer.span("wait", f"step {step}: from {peers}", times[at], times[at + 1])
                tracer.span("fold", f"step {step}: fold", times[at + 1], times[at + 2])
        elif operation[0] == _TAKE:
            if times[at]:
                tracer.span("wait", f"step {operation[2]}: from {operation[3]}", times[at], times[at + 1])
        else:
            continue
        at += 3
    return True
