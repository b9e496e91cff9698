"""What every transport must do. Run each of `CHECKS` on all ranks of a fresh transport; it raises if it fails.

A check is a function of the transport, called on all ranks at once. Those in `BREAKING` leave it unusable.
"""

from __future__ import annotations

import threading
import time

import torch

from ringred.testing.expecting import (
    PATIENCE,
    Check,
    barrier,
    check,
    expect,
    expect_half_a_second,
    expect_same,
    neighbours_of,
    pattern,
    peers_of,
    ready,
    soon,
)
from ringred.transports.base import Fault, FaultKind, Transport

__all__ = ["BREAKING", "CHECKS", "Check"]

CHECKS: dict[str, Check] = {}
BREAKING: dict[str, Check] = {}


@check(CHECKS)
def messages_keep_their_order(transport: Transport) -> None:
    left, right = neighbours_of(transport)
    transport.begin(1, 1)
    sources = [pattern(1 + index % 7, index) for index in range(50)]
    targets = [torch.empty_like(source) for source in sources]
    sends = [transport.isend(right, source) for source in sources]
    receives = [transport.irecv(left, target, lend=False) for target in targets]
    for receive in receives:
        transport.wait(receive, soon())
    for send in sends:
        transport.wait(send, soon())
    for index, target in enumerate(targets):
        expect_same(f"message {index}", target, sources[index])


@check(CHECKS)
def receives_may_be_posted_before_sends(transport: Transport) -> None:
    left, right = neighbours_of(transport)
    transport.begin(2, 2)
    targets = [torch.empty(3, dtype=torch.int64) for _ in range(20)]
    receives = [transport.irecv(left, target, lend=False) for target in targets]
    sends = [transport.isend(right, pattern(3, index)) for index in range(20)]
    for request in [*receives, *sends]:
        transport.wait(request, soon())
    for index, target in enumerate(targets):
        expect_same(f"message {index}", target, pattern(3, index))


@check(CHECKS)
def empty_messages_are_messages(transport: Transport) -> None:
    left, right = neighbours_of(transport)
    transport.begin(3, 3)
    empty, one = torch.empty(0), torch.full((1,), 7.0)
    target = torch.zeros(1)
    sends = [transport.isend(right, source) for source in (empty, one, empty)]
    for into in (torch.empty(0), target, torch.empty(0)):
        transport.wait(transport.irecv(left, into, lend=False), soon())
    for send in sends:
        transport.wait(send, soon())
    expect_same("the message between", target, one)


@check(CHECKS)
def large_messages_arrive_whole_both_ways_at_once(transport: Transport) -> None:
    left, right = neighbours_of(transport)
    transport.begin(4, 4)
    count = 1 << 20  # 8 MiB: more than anything buffers
    source, target = pattern(count, transport.rank), torch.empty(count, dtype=torch.int64)
    send = transport.isend(right, source)
    transport.wait(transport.irecv(left, target, lend=False), soon())
    transport.wait(send, soon())
    expect_same("8 MiB", target, pattern(count, left))


@check(CHECKS)
def every_pair_may_talk_at_once(transport: Transport) -> None:
    transport.begin(5, 5)
    peers = peers_of(transport)
    sends = [transport.isend(peer, pattern(1000, transport.rank * 100 + peer)) for peer in peers]
    targets = {peer: torch.empty(1000, dtype=torch.int64) for peer in peers}
    receives = [transport.irecv(peer, targets[peer], lend=False) for peer in peers]
    for request in [*receives, *sends]:
        transport.wait(request, soon())
    for peer in peers:
        expect_same(f"from rank {peer}", targets[peer], pattern(1000, peer * 100 + transport.rank))


@check(CHECKS)
def views_of_all_peers_are_lent_at_once(transport: Transport) -> None:
    transport.begin(6, 6)
    own = torch.zeros(500, dtype=torch.int64)
    peers = peers_of(transport)
    sends = [transport.isend(peer, pattern(500, 10 * turn + transport.rank)) for turn in range(3) for peer in peers]
    for turn in range(3):
        loans = [transport.irecv(peer, own, lend=True) for peer in peers]
        views = [transport.wait(loan, soon()) for loan in loans]
        for peer, view in zip(peers, views, strict=True):
            expect_same(f"lent by rank {peer}", view, pattern(500, 10 * turn + peer))
        for loan in reversed(loans):
            transport.release(loan)
    for send in sends:
        transport.wait(send, soon())
    expect_same("the destination of lending receives", own, torch.zeros(500, dtype=torch.int64))


@check(CHECKS)
def a_source_may_be_overwritten_after_its_wait(transport: Transport) -> None:
    left, right = neighbours_of(transport)
    transport.begin(7, 7)
    source = pattern(4000, 1)
    send = transport.isend(right, source)
    target = torch.empty(4000, dtype=torch.int64)
    receive = transport.irecv(left, target, lend=False)
    transport.wait(receive, soon())
    transport.wait(send, soon())
    source.fill_(-1)
    expect_same("what was sent before it was overwritten", target, pattern(4000, 1))


@check(CHECKS)
def all_dtypes_travel(transport: Transport) -> None:
    left, right = neighbours_of(transport)
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.complex64, torch.int16]
    for number, dtype in enumerate(dtypes):
        transport.begin(100 + number, 100 + number)
        source = torch.tensor([1, 0, 1, 1, 0]).to(dtype)
        target = torch.zeros(5, dtype=dtype)
        send = transport.isend(right, source)
        lent = transport.irecv(left, target, lend=True)
        expect_same(f"lent {dtype}", transport.wait(lent, soon()), source)
        transport.release(lent)
        transport.wait(send, soon())


@check(CHECKS)
def another_thread_may_drive_it(transport: Transport) -> None:
    failures: list[BaseException] = []

    def drive() -> None:
        try:
            messages_keep_their_order(transport)
        except BaseException as failure:
            failures.append(failure)

    for _ in range(2):
        thread = threading.Thread(target=drive)
        thread.start()
        thread.join()
    if failures:
        raise failures[0]


@check(CHECKS)
def payload_is_counted(transport: Transport) -> None:
    left, right = neighbours_of(transport)
    counters = transport.counters
    before = (counters.messages_sent, counters.bytes_sent, counters.messages_received, counters.bytes_received)
    transport.begin(8, 8)
    sends = [transport.isend(right, torch.zeros(10)), transport.isend(right, torch.zeros(3, dtype=torch.uint8))]
    for into in (torch.empty(10), torch.empty(3, dtype=torch.uint8)):
        transport.wait(transport.irecv(left, into, lend=False), soon())
    for send in sends:
        transport.wait(send, soon())
    after = (counters.messages_sent, counters.bytes_sent, counters.messages_received, counters.bytes_received)
    expect("counted", tuple(b - a for a, b in zip(before, after, strict=True)), (2, 43, 2, 43))


@check(CHECKS)
def a_subset_is_a_world_of_its_own(transport: Transport) -> None:
    members = [rank for rank in range(transport.size) if rank != 1]
    members.reverse()
    if transport.rank not in members:
        return
    inner = transport.subset(members, "without one")
    expect("rank in the subset", inner.rank, members.index(transport.rank))
    expect("size of the subset", inner.size, transport.size - 1)
    if inner.size > 1:
        messages_keep_their_order(inner)
    inner.close()


@check(CHECKS)
def closing_twice_is_closing_once(transport: Transport) -> None:
    barrier(transport)
    transport.close()
    transport.close()


# ---------------------------------------------------------------------- what goes wrong


def _fault(transport: Transport, peer: int, seconds: float = PATIENCE) -> Fault:
    """The fault that a receive from `peer` ends in."""
    try:
        transport.wait(transport.irecv(peer, torch.empty(4), lend=False), time.monotonic() + seconds)
    except Fault as fault:
        return fault
    raise AssertionError(f"a receive from rank {peer} ended well")


@check(BREAKING)
def a_deadline_ends_a_wait_and_names_the_peer(transport: Transport) -> None:
    if not ready(transport, "timed out", 20):
        return
    left, _ = neighbours_of(transport)
    began = time.monotonic()
    fault = _fault(transport, left, 0.5)
    waited = time.monotonic() - began
    if fault.kind == FaultKind.TIMEOUT:
        expect("the peer", fault.peer, left)
    elif fault.kind not in (FaultKind.PEER, FaultKind.ABORTED):  # another rank's deadline came first
        raise AssertionError(f"expected a timeout, got {fault}")
    expect_half_a_second(waited)
    transport.abort("timed out")


@check(BREAKING)
def a_message_of_another_collective_is_found_out(transport: Transport) -> None:
    if not ready(transport, "mismatch", 30, contract=30 + transport.rank):
        return
    left, right = neighbours_of(transport)
    send = transport.isend(right, torch.zeros(4))
    fault = _fault(transport, left, 5)
    if fault.kind not in (FaultKind.MISMATCH, FaultKind.ABORTED, FaultKind.PEER):
        raise AssertionError(f"expected a mismatch, got {fault}")
    transport.abort("mismatch")
    del send


@check(BREAKING)
def a_longer_message_is_found_out_and_written_nowhere(transport: Transport) -> None:
    if not ready(transport, "mismatch", 40):
        return
    left, right = neighbours_of(transport)
    memory = torch.zeros(1 << 16)
    send = transport.isend(right, torch.ones(1 << 18))
    try:
        transport.wait(transport.irecv(left, memory[:16], lend=False), time.monotonic() + 5)
    except Fault as fault:
        if fault.kind not in (FaultKind.MISMATCH, FaultKind.ABORTED, FaultKind.PEER):
            raise AssertionError(f"expected a mismatch, got {fault}") from None
    else:
        raise AssertionError("a message of 2^18 elements was taken for one of 16")
    transport.abort("mismatch")
    expect("elements written behind the destination", int(memory[16:].count_nonzero()), 0)
    del send


@check(BREAKING)
def an_abort_reaches_those_who_wait_and_carries_reports(transport: Transport) -> None:
    if not ready(transport, f"report of {transport.rank}", 50):
        return
    last = transport.size - 1
    if transport.rank == last:
        time.sleep(0.2)
        transport.abort(f"report of {last}")
    else:
        fault = _fault(transport, last)
        expect("the kind of fault", fault.kind, FaultKind.ABORTED)
        transport.abort(f"report of {transport.rank}")
    reports = transport.reports(10.0)
    expect("reports", reports, {rank: f"report of {rank}" for rank in range(transport.size)})
    # And from here on everything raises.
    left, _ = neighbours_of(transport)
    try:
        transport.begin(51, 51)
        _fault(transport, left, 5)
    except Fault as fault:
        expect("the kind of fault", fault.kind, FaultKind.ABORTED)


@check(BREAKING)
def a_peer_that_leaves_is_missed(transport: Transport) -> None:
    if not ready(transport, "rank 1 left", 60):
        return
    if transport.rank == 1:
        transport.close()
        return
    fault = _fault(transport, 1)
    if fault.kind not in (FaultKind.PEER, FaultKind.ABORTED):
        raise AssertionError(f"expected that rank 1 is gone, got {fault}")
    transport.abort("rank 1 left")
