"""After a failure the ranks that are left go on: they agree on who they are, and have the sums of their number."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch

import ringred
from ringred.communicator import Communicator
from ringred.errors import CollectiveTimeout, PeerFailed
from ringred.testing import run_ranks

TRANSPORTS = pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "torch_p2p"])
ALGORITHMS = ("ring", "torus", "tree", "halving_doubling", "direct")


def after_failure(comm: Communicator, dying: tuple[int, ...] = (1,)) -> Communicator:
    """What `shrink` gives to those that are left when the ranks `dying` raise in the middle of their calls."""
    with pytest.raises(PeerFailed):
        until_failure(comm, dying)
    return comm.shrink()


def until_failure(comm: Communicator, dying: tuple[int, ...]) -> None:
    try:
        for turn in range(10):
            if turn == 3 and comm.rank in dying:
                break
            comm.all_reduce(torch.ones(1000))
    finally:
        if comm.rank in dying:  # also if another was faster
            raise ZeroDivisionError("no batch left")


def numbers(rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def reduced(comm: Communicator, was: int) -> list[torch.Tensor]:
    """The sums by each algorithm over what the ranks hold that were `was` once."""
    results = []
    for algorithm in ALGORITHMS:
        results.append(numbers(was, 10_001))
        comm.all_reduce(results[-1], algorithm=algorithm)
    return results


@TRANSPORTS
def test_three_of_four_go_on_with_the_bits_of_three(transport: str) -> None:
    def of_four(comm: Communicator) -> tuple[int, int, list[torch.Tensor]]:
        left = after_failure(comm)
        assert comm.closed
        return left.rank, left.size, reduced(left, comm.rank)

    def of_three(comm: Communicator) -> list[torch.Tensor]:
        return reduced(comm, [0, 2, 3][comm.rank])

    results = run_ranks(of_four, 4, transport, return_exceptions=True)
    assert isinstance(results.pop(1), ZeroDivisionError)
    expected = run_ranks(of_three, 3, transport)
    for rank, (found, size, sums) in enumerate(results):
        assert (found, size) == (rank, 3)
        assert all(torch.equal(one, other) for one, other in zip(sums, expected[rank], strict=True))


@TRANSPORTS
def test_shrinking_again_and_again_until_one_is_left(transport: str) -> None:
    def body(comm: Communicator) -> list[tuple[int, int, float]]:
        seen = []
        while comm.size > 1:
            comm = after_failure(comm, (comm.size - 1,))
            total = torch.ones(3)
            comm.all_reduce(total)
            seen.append((comm.rank, comm.size, total[0].item()))
        return seen

    results = run_ranks(body, 4, transport, return_exceptions=True)
    assert results[0] == [(0, 3, 3.0), (0, 2, 2.0), (0, 1, 1.0)]
    assert all(isinstance(result, ZeroDivisionError) for result in results[1:])


@TRANSPORTS
def test_the_lowest_rank_and_another_die_at_once(transport: str) -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        left = after_failure(comm, (0, 3))
        left.barrier()
        return left.rank, left.size

    results = run_ranks(body, 5, transport, return_exceptions=True)
    assert [result for result in results if isinstance(result, tuple)] == [(0, 3), (1, 3), (2, 3)]


@TRANSPORTS
@pytest.mark.parametrize("second", [0, 2])
def test_a_rank_that_dies_while_they_agree_is_left_out_too(transport: str, second: int) -> None:
    """It has noticed the failure and does not come: it ends at some moment of the others' agreement."""

    def body(comm: Communicator) -> tuple[int, ...]:
        try:
            until_failure(comm, (1,))
        except PeerFailed:
            if comm.rank == second:
                time.sleep(0.3)
                raise
        left = comm.shrink()
        left.barrier()
        assert left.seat is not None
        return tuple(sorted(card.identity for card in left.seat.view.members)).__hash__(), left.size

    results = run_ranks(body, 5, transport, return_exceptions=True)
    views = [result for result in results if isinstance(result, tuple)]
    assert len(views) == 3
    assert len(set(views)) == 1, "all agree"
    assert views[0][1] == 3


def test_shrinking_without_a_failure_gives_the_same_ranks() -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        comm = comm.shrink()
        comm.barrier()
        return comm.rank, comm.size

    assert run_ranks(body, 3, "shm") == [(0, 3), (1, 3), (2, 3)]


def parting(comm: Communicator) -> list[str]:
    """Is told when the rank of `comm` parts ways with those that have ended."""
    told: list[str] = []
    assert comm.seat is not None
    comm.seat = comm.seat._replace(part_ways=lambda: told.append("parted"))
    return told


def test_those_that_live_part_ways_with_the_ended_once_all_ranks_shrink() -> None:
    def body(comm: Communicator) -> list[str]:
        told = parting(comm)
        if comm.rank < 2:
            some = comm.subset([0, 1], "some")
            assert some.seat is not None
            assert some.seat.part_ways is None  # the third would know nothing of it
            some.close()
        comm.duplicate().shrink().close()
        assert told == []  # nobody has ended
        after_failure(comm)
        return told

    results = run_ranks(body, 3, "shm", return_exceptions=True)
    assert isinstance(results.pop(1), ZeroDivisionError)
    assert results == [["parted"], ["parted"]]


def test_a_part_of_the_ranks_shrinks_by_itself() -> None:
    def body(comm: Communicator) -> tuple[int, int, bool]:
        part = comm.split(comm.rank % 2)
        assert part is not None
        whole = comm.rank % 2 == 1
        if not whole:
            part = after_failure(part, (2,))
        part.barrier()
        return part.rank, part.size, comm.closed

    results = run_ranks(body, 6, "shm", return_exceptions=True)
    assert isinstance(results[4], ZeroDivisionError)
    assert [results[rank] for rank in (0, 2)] == [(0, 2, False), (1, 2, False)]


def test_a_rank_that_does_not_come_is_left_out_and_told_so() -> None:
    def body(comm: Communicator) -> object:
        if comm.rank == 2:
            time.sleep(3.0)  # longer than the others wait
            with pytest.raises(ringred.RingredError):
                comm.barrier()
            with pytest.raises(PeerFailed, match="rank 2 of world was left out by those who went on"):
                comm.shrink()
            return "late"
        told = parting(comm)
        with pytest.raises(CollectiveTimeout):
            comm.barrier()
        left = comm.shrink()
        left.barrier()
        # The late one lives, and would wait at its end for those that part ways.
        assert told == []
        assert left.seat is not None
        assert left.seat.part_ways is None
        time.sleep(3.0)  # it is still there when the late one asks
        return left.size

    assert run_ranks(body, 3, "shm", timeout=1.0) == [2, 2, "late"]


def test_half_without_the_lowest_rank_does_not_go_on() -> None:
    """The other half may go on by itself, behind a cut network."""

    def body(comm: Communicator) -> object:
        if comm.rank < 2:
            time.sleep(3.0)
            return "elsewhere"
        with pytest.raises(CollectiveTimeout):
            comm.barrier()
        with pytest.raises(PeerFailed, match="2 of 4 members of world came, and cannot go on"):
            comm.shrink()
        return "stopped"

    results = run_ranks(body, 4, "shm", timeout=1.0)
    assert results == ["elsewhere", "elsewhere", "stopped", "stopped"]


def test_one_rank_alone_has_nothing_to_shrink() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ringred.RingredError, match="expected a communicator of ranks that reach each other"):
            comm.shrink()

    run_ranks(body, 1)


def test_nothing_is_left_behind() -> None:
    def body(comm: Communicator) -> None:
        after_failure(comm).barrier()

    run_ranks(body, 4, "shm", return_exceptions=True)
    gc.collect()  # exceptions hold frames, and these what they worked with
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for transport in ("shm", "torch_p2p", "local"):
        for _ in range(3):
            run_ranks(body, 4, transport, return_exceptions=True)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and threading.active_count() > before[1]:
        time.sleep(0.05)
    assert threading.active_count() <= before[1]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before[0]
