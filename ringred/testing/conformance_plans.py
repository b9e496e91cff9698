"""What running a plan over a transport must do, whether the transport's player plays it in one call or the executor
goes through it message by message. As in conformance.py: `CHECKS`, and `BREAKING` for those that leave it unusable.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from ringred.runtime.executor import Piece, Plan, bind, run
from ringred.runtime.folds import Folder, ReduceOp
from ringred.schedule.program import Fold, Instruction, PostReceive, PostSend, Program, Snapshot, Take, WaitSent
from ringred.testing.expecting import (
    PATIENCE,
    Check,
    check,
    expect,
    expect_half_a_second,
    expect_same,
    neighbours_of,
    pattern,
    peers_of,
    ready,
)
from ringred.transports.base import Fault, FaultKind, Transport, Windowed

__all__ = ["BREAKING", "CHECKS"]

CHECKS: dict[str, Check] = {}
BREAKING: dict[str, Check] = {}

_SHORT, _SLOT, _LONG = 7, 5_000, 300_001  # elements of 8 bytes: beside its descriptor, in a slot, in many


class _Writing:
    """One rank's instructions over `memory`, as they are written one after another."""

    def __init__(self, transport: Transport, memory: Tensor, folder: Folder | None = None) -> None:
        self.transport, self.memory, self.folder = transport, memory, folder
        self.instructions: list[Instruction] = []
        self.requests = self.slots = 0

    def _request(self) -> int:
        self.requests += 1
        return self.requests - 1

    def send(self, peer: int, lo: int, hi: int, put: bool = False, buffered: bool = False) -> WaitSent:
        """The instruction that waits for it."""
        request = self._request()
        self.instructions.append(PostSend(request, peer, lo, hi, None, put, buffered, 0))
        return WaitSent(request, peer)

    def send_a_copy(self, peer: int, lo: int, hi: int) -> WaitSent:
        """Of a snapshot that is taken now."""
        request, slot = self._request(), self.slots
        self.slots += hi - lo
        self.instructions += [Snapshot(lo, hi, slot), PostSend(request, peer, lo, hi, slot, False, False, 0)]
        return WaitSent(request, peer)

    def receive(self, peer: int, lo: int, hi: int, lend: bool = False) -> Take:
        """The instruction that waits for it."""
        request = self._request()
        self.instructions.append(PostReceive(request, peer, lo, hi, lend, 0))
        return Take(request, peer, lo, hi, 0)

    def fold(self, lent: list[Take], final: bool) -> None:
        """With this rank's own value, in rank order."""
        own = sum(take.peer < self.transport.rank for take in lent)
        requests, peers = tuple(take.request for take in lent), tuple(take.peer for take in lent)
        self.instructions.append(Fold(requests, peers, own, lent[0].lo, lent[0].hi, final, 0))

    def plan(self, exposed: bool = False) -> Plan:
        program = Program(tuple(self.instructions), self.requests, self.slots)
        piece = Piece(0, self.memory)
        return bind(program, [piece], self.folder, exposed=self.memory if exposed else None)


def _memories(transport: Transport) -> list[Callable[[int, torch.dtype], Tensor]]:
    """What makes memory of each kind that there is."""

    def tensor(elements: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(elements, dtype=dtype)

    return [tensor, cast(Windowed, transport).empty] if transport.windows else [tensor]


def _run(transport: Transport, plan: Plan, turn: int, contract: int | None = None, seconds: float = PATIENCE) -> None:
    run(plan, transport, turn if contract is None else contract, turn, int(seconds * 1e9))
    if transport.player is not None:
        expect("played in one call", plan.tape is not None, True)


@check(CHECKS)
def messages_of_a_plan_keep_their_order(transport: Transport) -> None:
    """Of all lengths, none of them too, some from a copy, some that are copied at once."""
    left, right = neighbours_of(transport)
    lengths = [length for _ in range(6) for length in (_SHORT, 0, _SLOT, 1, _LONG, _SHORT)]
    for turn, memory in enumerate(_memories(transport), 200):
        total = sum(lengths)
        buffer = memory(2 * total, torch.int64)
        buffer[:total] = pattern(total, transport.rank)
        written, at = _Writing(transport, buffer), 0
        sent, received = [], []
        for index, length in enumerate(lengths):
            if index % 5 == 4:
                sent.append(written.send_a_copy(right, at, at + length))
            else:
                sent.append(written.send(right, at, at + length, buffered=index % 2 == 0))
            received.append(written.receive(left, total + at, total + at + length))
            at += length
        written.instructions += [*received, *sent]
        _run(transport, written.plan(), turn)
        expect_same("all messages", buffer[total:], pattern(total, left))


@check(CHECKS)
def sends_wait_for_room_and_not_for_receives(transport: Transport) -> None:
    """More short messages than a ring has descriptors, and more long ones than there are slots, before any receive."""
    left, right = neighbours_of(transport)
    many, long, part = 700, 1 << 20, 1 << 17
    buffer = torch.empty(2 * (many + long), dtype=torch.int64)
    half = many + long
    buffer[:half] = pattern(half, transport.rank)
    written = _Writing(transport, buffer)
    bounds = [(at, at + 1) for at in range(many)] + [(at, at + part) for at in range(many, half, part)]
    sent = [written.send(right, lo, hi, buffered=True) for lo, hi in bounds]
    received = [written.receive(left, half + lo, half + hi) for lo, hi in bounds]
    written.instructions += [*received, *sent]
    _run(transport, written.plan(), 210)
    expect_same("all messages", buffer[half:], pattern(half, left))


@check(CHECKS)
def folds_are_in_rank_order_and_what_they_give_is_put(transport: Transport) -> None:
    """Each rank folds its share of a sum, and gives it to all; a plan is run again with other values."""
    size, rank, peers = transport.size, transport.rank, peers_of(transport)
    folder = Folder(ReduceOp.AVG, torch.float32, size)
    turn = 220
    for memory in _memories(transport):
        for elements in (size, 1_000, 200_003):
            bounds = [elements * share // size for share in range(size + 1)]
            buffer = memory(elements, torch.float32)
            written = _Writing(transport, buffer, folder)
            sent = [written.send(peer, bounds[peer], bounds[peer + 1], buffered=True) for peer in peers]
            own = bounds[rank], bounds[rank + 1]
            written.fold([written.receive(peer, *own, lend=True) for peer in peers], final=True)
            puts = transport.windows and cast(Windowed, transport).holds(buffer)
            sent += [written.send(peer, *own, put=puts) for peer in peers]
            for peer in peers:
                written.instructions.append(written.receive(peer, bounds[peer], bounds[peer + 1]))
            written.instructions += sent
            plan = written.plan(exposed=puts)
            for again in range(3):
                values = [
                    torch.randn(elements, generator=torch.Generator().manual_seed(10 * again + r)) for r in range(size)
                ]
                expected = torch.empty(elements)
                folder(expected, values, final=True)
                buffer.copy_(values[rank])
                _run(transport, plan, turn)
                expect_same(f"{elements} elements, time {again}", buffer, expected)
                turn += 1


@check(CHECKS)
def a_plan_is_counted(transport: Transport) -> None:
    left, right = neighbours_of(transport)
    counters = transport.counters
    buffer = torch.zeros(26)
    written = _Writing(transport, buffer)
    sent = [written.send(right, 0, 10), written.send(right, 10, 13)]
    received = [written.receive(left, 13, 23), written.receive(left, 23, 26)]
    written.instructions += [*received, *sent]
    before = (counters.messages_sent, counters.bytes_sent, counters.messages_received, counters.bytes_received)
    _run(transport, written.plan(), 250)
    after = (counters.messages_sent, counters.bytes_sent, counters.messages_received, counters.bytes_received)
    expect("counted", tuple(b - a for a, b in zip(before, after, strict=True)), (2, 52, 2, 52))


# ---------------------------------------------------------------------- what goes wrong


def _fault(
    transport: Transport, plan: Plan, turn: int, contract: int | None = None, seconds: float = PATIENCE
) -> Fault:
    """The fault in which `plan` ends."""
    try:
        _run(transport, plan, turn, contract, seconds)
    except Fault as fault:
        return fault
    raise AssertionError("a plan that cannot end well ended well")


def _waiting(transport: Transport, peer: int) -> Plan:
    """A plan that receives from `peer` what nobody sends."""
    written = _Writing(transport, torch.empty(4))
    written.instructions.append(written.receive(peer, 0, 4))
    return written.plan()


def _exchanging(transport: Transport, elements: int, expected: int) -> tuple[Plan, Tensor]:
    """A plan that sends `elements` to the right and wants `expected` from the left, and its memory, ones and zeros."""
    left, right = neighbours_of(transport)
    buffer = torch.zeros(2 * elements)
    buffer[:elements] = 1
    written = _Writing(transport, buffer)
    sent = written.send(right, 0, elements)
    written.instructions += [written.receive(left, elements, elements + expected), sent]
    return written.plan(), buffer


def _given_up(transport: Transport, fault: Fault, kind: str) -> None:
    """Gives up with what this rank found; of all ranks at least one has found a fault of this kind by itself, and the
    others that, or that one."""
    if fault.kind not in (kind, FaultKind.ABORTED, FaultKind.PEER):
        raise AssertionError(f"expected {kind}, got {fault}")
    transport.abort(fault.kind)
    reports = transport.reports(10.0)
    if kind not in reports.values():
        raise AssertionError(f"expected that a rank found {kind}, got {reports}")


@check(BREAKING)
def a_deadline_ends_a_plan_and_names_the_peer(transport: Transport) -> None:
    if not ready(transport, "timed out", 300):
        return
    left, _ = neighbours_of(transport)
    began = time.monotonic()
    fault = _fault(transport, _waiting(transport, left), 301, seconds=0.5)
    waited = time.monotonic() - began
    if fault.kind == FaultKind.TIMEOUT:
        expect("the peer", fault.peer, left)
    expect_half_a_second(waited)
    _given_up(transport, fault, FaultKind.TIMEOUT)


@check(BREAKING)
def a_plan_of_another_collective_is_found_out(transport: Transport) -> None:
    if not ready(transport, "mismatch", 310):
        return
    plan, _ = _exchanging(transport, 4, 4)
    _given_up(transport, _fault(transport, plan, 311, contract=311 + transport.rank), FaultKind.MISMATCH)


@check(BREAKING)
def a_longer_message_than_a_plan_expects_is_written_nowhere(transport: Transport) -> None:
    if not ready(transport, "mismatch", 320):
        return
    plan, buffer = _exchanging(transport, 1 << 18, 16)
    _given_up(transport, _fault(transport, plan, 321), FaultKind.MISMATCH)
    expect("elements written", int(buffer[1 << 18 :].count_nonzero()), 0)


@check(BREAKING)
def an_abort_reaches_those_who_play(transport: Transport) -> None:
    if not ready(transport, f"report of {transport.rank}", 330):
        return
    last = transport.size - 1
    if transport.rank == last:
        time.sleep(0.2)  # the others wait by then, most of the time
    else:
        expect("the kind of fault", _fault(transport, _waiting(transport, last), 331).kind, FaultKind.ABORTED)
    transport.abort(f"report of {transport.rank}")
    reports = transport.reports(10.0)
    expect("reports", reports, {rank: f"report of {rank}" for rank in range(transport.size)})
    left, _ = neighbours_of(transport)
    expect("the kind of fault", _fault(transport, _waiting(transport, left), 332).kind, FaultKind.ABORTED)


@check(BREAKING)
def a_peer_that_leaves_is_missed_by_a_plan(transport: Transport) -> None:
    if not ready(transport, "rank 1 left", 340):
        return
    if transport.rank == 1:
        transport.close()
        return
    fault = _fault(transport, _waiting(transport, 1), 341)
    if fault.kind not in (FaultKind.PEER, FaultKind.ABORTED):
        raise AssertionError(f"expected that rank 1 is gone, got {fault}")
    transport.abort("rank 1 left")
