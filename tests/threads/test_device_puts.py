"""Folds on a device that put their result into the peers' memory in the same pass, and slots that wait to be needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ringred.communicator import Communicator
from ringred.testing import run_ranks
from ringred.testing.fake_device import FakeDevice

RANKS = 3


class Counting(FakeDevice):
    """A device that counts its copies and, of each fold, the peers that get the result as well; `forgets` leaves them
    out."""

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.copies, self.puts, self.forgets = 0, list[int](), forgets

    def stream(self) -> Any:
        stream: Any = super().stream()
        copy, fold = stream.copy, stream.fold

        def counted_copy(*arguments: Any) -> None:
            self.copies += 1
            copy(*arguments)

        def counted_fold(kernel: Any, out: Any, operands: Any, final: bool, also: Sequence[int] = ()) -> None:
            self.puts.append(len(also))
            fold(kernel, out, operands, final, () if self.forgets else also)

        stream.copy, stream.fold = counted_copy, counted_fold
        return stream


def reduced(elements: int, algorithm: str) -> Callable[[Communicator], tuple[int, list[int], bool]]:
    """An all-reduce in a window: copies, peers that each fold put to, and whether the sum is right."""

    def body(comm: Communicator) -> tuple[int, list[int], bool]:
        transport: Any = comm.transport
        device = transport.queue.driver
        tensor = comm.empty(elements).fill_(comm.rank + 1.0)
        comm.barrier()
        device.copies, device.puts = 0, []
        comm.all_reduce(tensor, algorithm=algorithm)
        comm.synchronize()
        return device.copies, device.puts, bool(tensor.eq(6.0).all())

    return body


def on_counting(body: Callable[[Communicator], Any], forgets: bool = False, size: int = RANKS) -> list[Any]:
    return run_ranks(body, size, "cuda_ipc:fake", driver=lambda rank: Counting(forgets), timeout=10)


def test_direct_in_a_window_is_one_pass_without_a_copy() -> None:
    assert on_counting(reduced(6000, "direct")) == [(0, [RANKS - 1], True)] * RANKS


def test_a_short_message_is_copied_once_to_a_slot_and_put_back_by_the_fold() -> None:
    assert on_counting(reduced(RANKS, "direct")) == [(RANKS - 1, [RANKS - 1], True)] * RANKS


def test_the_last_fold_of_a_ring_puts_to_the_next_rank() -> None:
    assert on_counting(reduced(6000, "ring")) == [(RANKS - 2, [0] * (RANKS - 2) + [1], True)] * RANKS


@pytest.mark.parametrize("algorithm", ["direct", "ring"])
def test_a_fold_that_does_not_put_what_it_says_is_noticed(algorithm: str) -> None:
    assert not all(right for _, _, right in on_counting(reduced(6000, algorithm), forgets=True))


def test_a_rank_whose_memory_is_not_exposed_gets_a_message() -> None:
    def body(comm: Communicator) -> bool:
        for _ in range(5):
            tensor = comm.empty(6000) if comm.rank else torch.empty(6000)
            comm.all_reduce(tensor.fill_(comm.rank + 1.0), algorithm="direct")
            comm.synchronize()
            if not tensor.eq(6.0).all():
                return False
        return True

    assert on_counting(body) == [True] * RANKS


def test_large_slots_are_taken_for_the_peers_that_need_them_and_given_back() -> None:
    def body(comm: Communicator) -> tuple[list[int], list[int]]:
        transport: Any = comm.transport
        plane = transport.queue
        taken, chunks = [], []
        for tensor in (comm.empty(6000), torch.empty(3), torch.empty(6000)):  # exposed; fits into small ones; does not
            comm.all_reduce(tensor.fill_(1.0), algorithm="direct")
            taken.append(len(plane._large))
        for _ in range(12):
            there = comm.duplicate()
            there.all_reduce(torch.ones(6000), algorithm="direct")
            there.close()
            chunks.append(len(plane._memory._chunks))
        return taken, chunks

    for taken, chunks in run_ranks(body, RANKS, "cuda_ipc:fake", timeout=10):
        assert taken == [0, 0, RANKS - 1]
        # Two for each, if memory of closed communicators were not used again, once the streams are past it.
        assert chunks[-1] < chunks[0] + 12


class Full(FakeDevice):
    """A device that has room for what is taken when a communicator is made, and for no slots."""

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.chunk_bytes:
            raise RuntimeError("out of memory")
        return super().allocate(nbytes)


def test_a_device_without_room_for_slots_is_named_with_what_they_are_for() -> None:
    def body(comm: Communicator) -> None:
        comm.all_reduce(comm.empty(6000).fill_(1.0), algorithm="direct")
        comm.all_reduce(torch.ones(6000), algorithm="direct")

    drivers = [FakeDevice, Full, FakeDevice]
    failures = run_ranks(body, 3, "cuda_ipc:fake", driver=lambda rank: drivers[rank](), return_exceptions=True)
    said = str(failures[1])
    assert "its device failed: expected room for 64 MiB of its memory, in which messages to rank" in said, failures
    assert "out of memory" in said
    assert all("rank 1" in str(failure) and "room for 64 MiB" in str(failure) for failure in failures), failures
