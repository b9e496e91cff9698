"""What ranks hear of each other when they end: calls that differed, and exceptions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch

from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch, PeerFailed
from ringred.testing import run_ranks

TRANSPORTS = pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "cuda_ipc:fake", "torch_p2p"])


@TRANSPORTS
@pytest.mark.parametrize("before", [0, 3])
def test_the_root_of_a_small_broadcast_hears_at_close_that_another_call_was_made(transport: str, before: int) -> None:
    def body(comm: Communicator) -> None:
        for _ in range(before):
            comm.barrier()
        if comm.rank == 0:
            comm.broadcast(torch.ones(3), 0)  # the last thing that it does
        else:
            comm.all_reduce(torch.ones(3))

    for rank, failure in enumerate(run_ranks(body, 2, transport, timeout=10, return_exceptions=True)):
        assert isinstance(failure, CollectiveMismatch), (rank, failure)
        text = str(failure)
        assert f"rank 0 broadcast #{before + 1} (float32, 3 elements, root 0" in text, text
        assert f"rank 1 all_reduce #{before + 1} (sum, float32, 3 elements" in text, text
        assert len(re.findall(r"test_ending\.py:\d+", text)) >= 2, text


@TRANSPORTS
def test_of_several_broadcasts_the_one_is_named_that_differed(transport: str) -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        comm.broadcast(torch.ones(3), 0)
        if comm.rank == 0:
            comm.broadcast(torch.ones(4), 0)
            comm.broadcast(torch.ones(5), 0)
        else:
            comm.all_reduce(torch.ones(4))

    text = str(run_ranks(body, 2, transport, timeout=10, return_exceptions=True)[0])
    assert "rank 0 broadcast #3 (float32, 4 elements" in text, text
    assert "rank 1 all_reduce #3" in text, text


@TRANSPORTS
@pytest.mark.parametrize(
    "last",
    [
        lambda comm: comm.broadcast(torch.ones(3), 0),
        lambda comm: comm.reduce(torch.ones(3), 1),
        lambda comm: comm.gather(torch.ones(3), torch.empty(6) if comm.rank == 1 else None, 1),
        lambda comm: comm.scatter(torch.ones(3), torch.ones(6) if comm.rank == 0 else None, 0),
    ],
)
def test_where_all_made_the_same_call_closing_is_silent(transport: str, last: Callable[[Communicator], None]) -> None:
    def body(comm: Communicator) -> None:
        last(comm)

    assert run_ranks(body, 2, transport, timeout=10) == [None, None]


def test_a_peer_that_leaves_without_receiving_is_no_error_of_a_root_that_was_done() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.broadcast(torch.ones(3), 0)

    assert run_ranks(body, 2, "shm", timeout=10) == [None, None]


@TRANSPORTS
def test_close_in_a_finally_tells_the_exception_that_it_runs_under(transport: str) -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        try:
            if comm.rank == 1:
                raise ValueError("no batch left")
            comm.all_reduce(torch.ones(3))
        finally:
            comm.close()

    first, second = run_ranks(body, 2, transport, timeout=10, return_exceptions=True)
    assert isinstance(second, ValueError)
    assert isinstance(first, PeerFailed)
    assert "rank 1 raised ValueError: no batch left" in str(first)


def test_close_after_an_exception_that_was_dealt_with_tells_nothing() -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            try:
                raise KeyError("handled")
            except KeyError:
                pass
            comm.close()
        else:
            comm.all_reduce(torch.ones(3))

    first, second = run_ranks(body, 2, timeout=10, return_exceptions=True)
    assert second is None
    assert isinstance(first, PeerFailed)
    assert "rank 1" in str(first)
    assert "handled" not in str(first)


def test_work_that_is_tried_again_in_an_except_is_no_failure() -> None:
    """The exception is over when the second try closes its communicator."""

    def attempt(comm: Communicator, batch: int) -> float:
        if batch > 32:
            raise MemoryError("too large")
        part = comm.duplicate()
        tensor = torch.full((3,), float(comm.rank))
        if comm.rank == 1:
            time.sleep(0.2)
        part.broadcast(tensor, 0)
        part.close()
        return tensor[0].item()

    def body(comm: Communicator) -> float:
        try:
            return attempt(comm, 64)
        except MemoryError:
            result = attempt(comm, 32)
            part = comm.duplicate()
            part.broadcast(torch.ones(3), 0)
            part.close()  # made under the exception: it has nothing to do with it
            return result

    assert run_ranks(body, 2, "shm", timeout=10) == [0.0, 0.0]


def test_ranks_that_all_believe_to_be_the_root_are_told_at_close() -> None:
    """Over shared memory, where a sender sees what was received."""

    def body(comm: Communicator) -> None:
        comm.broadcast(torch.ones(3), comm.rank)

    began = time.monotonic()
    for failure in run_ranks(body, 2, "shm", timeout=20, return_exceptions=True):
        assert isinstance(failure, CollectiveMismatch), failure
        assert "broadcast #1" in str(failure)
    assert time.monotonic() - began < 10


def test_a_root_that_leaves_before_a_slow_peer_receives_does_not_fail_it() -> None:
    def body(comm: Communicator) -> float:
        tensor = torch.full((3,), float(comm.rank))
        if comm.rank == 1:
            time.sleep(1.2)
            comm.set_timeout(10)
        comm.broadcast(tensor, 0)
        return tensor[0].item()

    assert run_ranks(body, 2, "shm", timeout=0.5) == [0.0, 0.0]
