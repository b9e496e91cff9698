"""The order of instructions: what is pipelined, what waits, and what is copied first."""

from __future__ import annotations

from collections import defaultdict

import pytest

from ringred.collectives.registry import COLLECTIVES, algorithms, groups, lookup
from ringred.runtime.select import share_bounds
from ringred.schedule.ir import Chunk, Recv, Send, unit
from ringred.schedule.lower import lower
from ringred.schedule.order import in_step, turns
from ringred.schedule.program import Fold, Instruction, PostReceive, PostSend, Snapshot, Take, WaitSent


def ring(rank: int, size: int, count: int, segment: int) -> list:
    entry = lookup("all_reduce", "ring")
    return list(lower(rank, entry.steps(entry.group(size))(rank), share_bounds(count, size), segment).instructions)


def test_a_segment_goes_out_as_soon_as_it_is_folded() -> None:
    """Ring of 4, chunks of 4 segments: what is sent in step 1 is what step 0 folded, segment by segment."""
    program = ring(0, 4, 64, 4)
    folds = [at for at, op in enumerate(program) if isinstance(op, Fold) and op.step == 0]
    sends = [at for at, op in enumerate(program) if isinstance(op, PostSend) and op.step == 1]
    assert len(folds) == len(sends) == 4
    for segment in range(3):
        assert folds[segment] < sends[segment] < folds[segment + 1]


def test_every_receive_is_posted_before_it_is_waited_for_and_in_the_order_of_its_pair() -> None:
    for name in ("ring", "direct", "torus", "halving_doubling", "double_tree"):
        entry = lookup("all_reduce", name)
        group = entry.group(6, segments=3)
        for rank in range(6):
            program = lower(rank, entry.steps(group)(rank), share_bounds(100, entry.units(group)), 3).instructions
            posted: dict[int, list[int]] = {}
            for op in program:
                if isinstance(op, PostReceive):
                    posted.setdefault(op.peer, []).append(op.request)
                elif isinstance(op, Fold):
                    assert all(request in posted[peer] for request, peer in zip(op.requests, op.peers, strict=True))
                elif isinstance(op, Take):
                    assert op.request in posted[op.peer]
            assert all(requests == sorted(requests) for requests in posted.values())


def check_receives_are_posted_into_free_memory(instructions: tuple) -> None:
    """Nothing is received into place while an earlier send, not yet waited for, reads the place, or before a copy or a
    send that is to read what was there."""
    reading: dict[int, tuple[int, int]] = {}
    landing: dict[int, tuple[int, int]] = {}

    def none_of(spans: dict[int, tuple[int, int]], op: PostSend | PostReceive | Snapshot) -> None:
        overlapping = [span for span in spans.values() if span[0] < op.hi and op.lo < span[1]]
        assert not overlapping, f"{op} and {overlapping}"

    for op in instructions:
        if isinstance(op, Snapshot) or (isinstance(op, PostSend) and op.slot is None):
            none_of(landing, op)
        if isinstance(op, PostSend) and op.slot is None:
            reading[op.request] = (op.lo, op.hi)
        elif isinstance(op, WaitSent):
            reading.pop(op.request, None)
        elif isinstance(op, PostReceive) and not op.lend:
            none_of(reading, op)
            landing[op.request] = (op.lo, op.hi)
        elif isinstance(op, Take):
            landing.pop(op.request, None)


@pytest.mark.parametrize("depth", [1, 8])
def test_no_receive_is_posted_into_memory_that_a_send_still_reads(depth: int) -> None:
    for collective in COLLECTIVES:
        for entry in algorithms(collective).values():
            for group in [group for size in (2, 3, 5, 6) for group in groups(entry, size)]:
                for rank in range(group.size):
                    steps, bounds = entry.steps(group)(rank), share_bounds(40, entry.units(group))
                    in_parts = in_step(entry.steps(group), group.size)
                    told = turns(entry.steps(group), group.size) if in_parts and depth > 1 else ()
                    for segment in (1, 3, 100):
                        for how in ({}, {"in_parts": in_parts, "turns": told}):
                            program = lower(rank, steps, bounds, segment, depth=depth, **how).instructions
                            check_receives_are_posted_into_free_memory(program)
    # Two receives overwrite what one send reads, and only the first of them has to wait.
    steps = [(Send(1, Chunk(0, 2)),), (Recv(1, unit(0)), Recv(2, unit(1)))]
    program = lower(0, steps, [(0, 4), (4, 8)], 100, depth=depth).instructions
    check_receives_are_posted_into_free_memory(program)
    assert sum(isinstance(op, WaitSent) for op in program) == 1
    swap = lower(0, [(Send(1, unit(0)), Recv(1, unit(0)))], [(0, 8)], 4, depth=depth).instructions
    assert sum(isinstance(op, Snapshot) for op in swap) == 2
    check_receives_are_posted_into_free_memory(swap)


def test_ring_waits_only_for_sends_whose_source_is_overwritten() -> None:
    program = ring(1, 4, 64, 16)
    before_end = program[: max(at for at, op in enumerate(program) if isinstance(op, Take)) + 1]
    waited = [op for op in before_end if isinstance(op, WaitSent)]
    # Three chunks are sent by the reduce-scatter and then replaced by the all-gather; the fourth never leaves.
    assert len(waited) == 3
    sends = [op for op in program if isinstance(op, PostSend)]
    assert len(sends) == 6
    assert {op.request for op in program if isinstance(op, WaitSent)} == {op.request for op in sends}


def test_a_chunk_sent_and_received_in_one_step_is_sent_from_one_copy() -> None:
    entry = lookup("all_reduce", "one_shot")
    program = lower(0, entry.steps(entry.group(4))(0), [(0, 10)], 4)
    snapshots = [op for op in program.instructions if isinstance(op, Snapshot)]
    sends = [op for op in program.instructions if isinstance(op, PostSend)]
    assert [(s.lo, s.hi) for s in snapshots] == [(0, 4), (4, 8), (8, 10)]
    assert len(sends) == 9, "three segments to three peers"
    assert all(send.slot is not None for send in sends)
    assert program.slot_elements == 10
    bare = lower(0, entry.steps(entry.group(4))(0), [(0, 10)], 4, snapshots=False)
    assert not any(isinstance(op, Snapshot) for op in bare.instructions)


def test_only_the_last_fold_of_what_a_rank_keeps_is_final() -> None:
    program = ring(2, 4, 64, 64)
    assert [op.final for op in program if isinstance(op, Fold)] == [False, False, True]
    entry = lookup("reduce_scatter", "torus")
    group = entry.group(6, grid=(3, 2))
    home = entry.home(group)
    for rank in range(6):
        steps = entry.steps(group)(rank)
        lowered = lower(rank, steps, share_bounds(60, 6), 60, keep=lambda u, rank=rank: home[u] == rank)
        assert [op.final for op in lowered.instructions if isinstance(op, Fold)] == [False, False, True]


def test_receives_of_several_peers_take_turns_segment_by_segment() -> None:
    steps = [(Recv(1, unit(0)), Recv(2, unit(1)))]
    program = lower(0, steps, [(0, 4), (4, 8)], 2).instructions
    assert [(op.peer, op.lo) for op in program if isinstance(op, Take)] == [(1, 0), (2, 4), (1, 2), (2, 6)]


def test_units_that_are_not_adjacent_are_cut_apart_and_empty_ones_left_out() -> None:
    steps = [(Send(1, Chunk(0, 4)),)]
    program = lower(0, steps, [(6, 9), (9, 9), (0, 3), (3, 4)], 100).instructions
    assert [(op.lo, op.hi) for op in program if isinstance(op, PostSend)] == [(6, 9), (0, 4)]
    empty = lower(0, steps, [(5, 5)] * 4, 100).instructions
    assert [(op.lo, op.hi) for op in empty if isinstance(op, PostSend)] == [(5, 5)], "an empty message is still one"


def test_units_in_tensors_of_their_own_are_not_merged() -> None:
    steps = [(Send(1, Chunk(0, 3)),)]
    program = lower(0, steps, [(0, 2), (2, 2), (2, 5)], 100, merge=False).instructions
    assert [(op.lo, op.hi) for op in program if isinstance(op, PostSend)] == [(0, 2), (2, 5)]


@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 8])
def test_both_ends_of_a_pair_put_parts_in_one_order(size: int, depth: int) -> None:
    """Where messages are not sent and received in steps of the same number, there are no parts, and no words."""
    for name, entry in algorithms("all_reduce").items():
        if entry.native:
            continue
        group = entry.group(size)
        steps = entry.steps(group)
        in_parts = in_step(steps, size)
        assert in_parts or name in {"tree", "double_tree", "chain", "halving_doubling", "hierarchical"}, name
        told = turns(steps, size) if in_parts and depth > 1 else ()
        bounds = share_bounds(1001, entry.units(group))
        programs = [
            lower(rank, steps(rank), bounds, 7, in_parts=in_parts, depth=depth, turns=told).instructions
            for rank in range(size)
        ]
        for sender in range(size):
            for receiver in range(size):
                sent = [(op.lo, op.hi) for op in programs[sender] if isinstance(op, PostSend) and op.peer == receiver]
                posted = [
                    (op.lo, op.hi) for op in programs[receiver] if isinstance(op, PostReceive) and op.peer == sender
                ]
                assert sent == posted, (name, sender, receiver)


def stands_still(programs: list[tuple[Instruction, ...]]) -> bool:
    """Whether ranks get stuck, where a send is done only when its receiver has posted the receive, and a receive when
    its sender has posted the send."""
    at = [0] * len(programs)
    sent: dict[tuple[int, int], list[int]] = defaultdict(list)  # by sender and receiver: requests, in order
    posted: dict[tuple[int, int], list[int]] = defaultdict(list)

    def met(rank: int, peer: int, request: int, mine: dict[tuple[int, int], list[int]], sends: bool) -> bool:
        pair = (rank, peer) if sends else (peer, rank)
        return len((posted if sends else sent)[pair]) > mine[pair].index(request)

    peer_of = [
        {op.request: op.peer for op in program if isinstance(op, (PostSend, PostReceive))} for program in programs
    ]
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                op = program[at[rank]]
                if isinstance(op, PostSend):
                    sent[rank, op.peer].append(op.request)
                elif isinstance(op, PostReceive):
                    posted[op.peer, rank].append(op.request)
                elif isinstance(op, WaitSent):
                    if not met(rank, op.peer, op.request, sent, True):
                        break
                elif isinstance(op, (Fold, Take)):
                    requests = op.requests if isinstance(op, Fold) else (op.request,)
                    if not all(met(rank, peer_of[rank][one], one, posted, False) for one in requests):
                        break
                at[rank] += 1
                moved = True
    return any(place < len(program) for place, program in zip(at, programs, strict=True))


@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_nobody_waits_for_ever_where_every_send_waits_for_its_receive(size: int, depth: int) -> None:
    for collective in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all"):
        for name, entry in algorithms(collective).items():
            if entry.native:
                continue
            for segments, count in ((1, 5), (1, 300), (2, 100), (4, 100)):
                group = entry.group(size, segments=segments)
                steps = entry.steps(group)
                bounds = share_bounds(count, entry.units(group))
                in_parts = in_step(steps, size)
                told = turns(steps, size) if in_parts and depth > 1 else ()
                programs = [
                    lower(rank, steps(rank), bounds, 7, in_parts=in_parts, depth=depth, turns=told).instructions
                    for rank in range(size)
                ]
                assert not stands_still(programs), (collective, name, segments, count)


def test_depth_posts_receives_before_their_data_comes() -> None:
    """Two ranks exchange halves: with a depth no receive is posted only when the one before it has come."""
    entry = lookup("all_reduce", "ring")
    group = entry.group(2)
    for depth, least in ((1, 1), (8, 3)):
        program = lower(0, entry.steps(group)(0), share_bounds(1024, 2), 16, in_parts=True, depth=depth).instructions
        ahead = []
        open_now = 0
        for op in program:
            open_now += isinstance(op, PostReceive) - isinstance(op, (Fold, Take))
            if isinstance(op, (Fold, Take)):
                ahead.append(open_now + 1)
        middle = sorted(ahead)[len(ahead) // 4]
        assert middle >= least, (depth, ahead)


def test_where_messages_take_long_receives_are_posted_before_sends() -> None:
    entry = lookup("all_reduce", "halving_doubling")
    for depth, kinds in ((1, [PostSend, PostReceive]), (8, [PostReceive, PostSend])):
        program = lower(0, entry.steps(entry.group(2))(0), share_bounds(64, 2), 16, in_parts=True, depth=depth)
        assert [type(op) for op in program.instructions[:4:2]] == kinds


def test_a_rank_that_turns_to_another_sender_tells_it_and_long_data_waits_for_that() -> None:
    for name, size, expected in (("ring", 8, 0), ("central", 4, 0), ("halving_doubling", 8, 4), ("torus", 4, 2)):
        entry = lookup("all_reduce", name)
        group = entry.group(size)
        steps, bounds = entry.steps(group), share_bounds(1024, entry.units(group))
        told = turns(steps, size)
        for rank in range(size):
            program = lower(rank, steps(rank), bounds, 16, in_parts=True, depth=8, turns=told).instructions
            words = [op for op in program if isinstance(op, Take) and op.lo == op.hi]
            assert len(words) == expected, (name, rank)
            for word in words:
                data = next(
                    at
                    for at, op in enumerate(program)
                    if isinstance(op, PostSend) and op.step == word.step and op.peer == word.peer and op.lo < op.hi
                )
                assert program.index(word) < data
                before = [op for op in program if isinstance(op, (Fold, Take)) and op.step < word.step]
                said = [op for op in program if isinstance(op, PostSend) and op.lo == op.hi and op.step == word.step]
                assert all(program.index(one) < program.index(said[0]) for one in before if one.lo < one.hi)
    short = lower(0, steps(0), share_bounds(4, 4), 16, in_parts=True, depth=8, turns=told).instructions
    assert not [op for op in short if isinstance(op, Take) and op.lo == op.hi], "a short message needs no word"
