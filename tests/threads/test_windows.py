"""Windows: their heap, tensors in them, and collectives that mix them with ordinary memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch

from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch
from ringred.testing import run_ranks
from ringred.transports.neighbours import Neighbours
from ringred.transports.windows import Heap, adopt, create

BOTH = pytest.mark.parametrize("transport", ["shm", "shm:python"])


def test_blocks_are_taken_first_fit_and_merge_when_given_back() -> None:
    descriptor, window = create(2)
    os.close(descriptor)
    heap = Heap(window)
    first, second, third = heap.take(10), heap.take(100), heap.take(8192)
    assert first == 0
    assert second == 64
    assert third == 4096
    heap.give_back(first, 10)
    assert heap.take(64) == 0, "the gap that was left"
    heap.give_back(0, 64)
    heap.give_back(third, 8192)
    heap.give_back(second, 100)
    assert heap.take(window.nbytes) == 0, "all of it is one block again"
    with pytest.raises(MemoryError, match="has no room for 1 more"):
        heap.take(1)


def test_a_tensor_holds_its_block_as_long_as_any_view_of_it() -> None:
    descriptor, window = create(2)
    twin = adopt(descriptor)
    os.close(descriptor)
    heap = Heap(window)
    tensor = heap.empty(1 << 16, torch.float32)
    offset = tensor.data_ptr() - window.address
    tensor.fill_(7)
    view = tensor[5:10]
    del tensor
    gc.collect()
    assert twin.view(offset, 64, torch.float32).eq(7).all()
    assert heap.take(64) != offset
    del view
    gc.collect()
    assert heap.take(1 << 18) == offset
    assert not twin.view(offset, 64, torch.float32).any(), "its pages went back to the system"


def test_memory_that_could_shrink_is_refused() -> None:
    descriptor = os.memfd_create("unsealed")
    os.ftruncate(descriptor, 4096)
    with pytest.raises(OSError, match="shrink"):
        adopt(descriptor)
    os.close(descriptor)


def test_a_freed_pointer_may_come_back_as_another_tensor() -> None:
    """Plans are kept by address: what lies there now counts, and nothing is kept alive."""

    def body(comm: Communicator) -> bool:
        good = True
        for turn in range(30):
            tensor = torch.full((1000,), float(turn + comm.rank))
            comm.all_reduce(tensor, algorithm="direct")
            good &= bool((tensor == 2 * turn + 1).all())
            del tensor
        before = comm.empty(1 << 20)
        address = before.data_ptr()
        comm.all_reduce(before.fill_(1.0), algorithm="direct")
        del before
        after = comm.empty(1 << 20)
        good &= after.data_ptr() == address
        comm.all_reduce(after.fill_(3.0), algorithm="direct")
        return good and bool((after == 6).all())

    assert run_ranks(body, 2, "shm") == [True, True]


@BOTH
@pytest.mark.parametrize("algorithm", ["ring", "direct", "one_shot", "halving_doubling", "tree", "torus"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_windows_and_ordinary_tensors_meet(algorithm: str, size: int, transport: str) -> None:
    """Some ranks in windows, at other places of them, some not; many segments; twice the same memory."""

    def body(comm: Communicator) -> bool:
        count = 700_001
        room = comm.empty(count + 10 * comm.size) if comm.rank % 2 == 0 else torch.empty(count + 10 * comm.size)
        tensor = room[10 * comm.rank : 10 * comm.rank + count]
        for turn in range(2):
            tensor.copy_(torch.arange(count) % 97 + comm.rank + turn)
            comm.all_reduce(tensor, algorithm=algorithm)
            added = sum(range(comm.size)) + turn * comm.size
            if not torch.equal(tensor, (torch.arange(count) % 97 * comm.size + added).float()):
                return False
        return True

    assert all(run_ranks(body, size, transport))


def test_kinds_of_memory_that_decide_otherwise_are_named() -> None:
    def body(comm: Communicator) -> None:
        comm.tune({"tensor": (1.0, 0.0, 0.0, 0.0, 0.0), "window": (0.0, 1.0, 1.0, 0.0, 0.0)})
        comm.all_reduce(comm.empty(1000) if comm.rank else torch.ones(1000))

    for failure in run_ranks(body, 3, "shm", return_exceptions=True):
        assert isinstance(failure, CollectiveMismatch)
        assert "in a window" in str(failure)
        assert "one_shot" in str(failure)


def test_async_calls_on_the_same_window_run_in_order() -> None:
    def body(comm: Communicator) -> bool:
        tensor = comm.empty(300_000).fill_(1.0)
        works = [comm.all_reduce(tensor, algorithm="direct", async_op=True) for _ in range(4)]
        comm.all_reduce(tensor, algorithm="one_shot")
        for work in works:
            work.wait()
        return bool((tensor == 2.0**5).all())

    assert run_ranks(body, 2, "shm") == [True, True]


def test_communicators_come_and_go_without_filling_the_window() -> None:
    def body(comm: Communicator) -> int:
        free = []
        for _ in range(12):
            child = comm.split(0)
            assert child is not None
            child.all_reduce(torch.ones(5))
            child.close()
            comm.barrier()
            free.append(comm.empty(1 << 12).data_ptr())
        return max(free) - min(free)

    # A control block of 3 ranks is 6 MiB: twelve of them would be 72.
    assert max(run_ranks(body, 3, "shm")) <= 24 << 20, "control blocks of closed communicators are used again"


@pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "cuda_ipc:fake"])
@pytest.mark.parametrize("algorithm", ["double_tree", "tree", "ring", "direct", "halving_doubling", "torus"])
def test_data_of_very_many_segments(transport: str, algorithm: str) -> None:
    def body(comm: Communicator) -> bool:
        tensor = torch.arange(8192) + comm.rank
        comm.all_reduce(tensor, algorithm=algorithm)
        return torch.equal(tensor, torch.arange(8192) * comm.size + sum(range(comm.size)))

    assert all(run_ranks(body, 4, transport, segment_bytes=64))


@BOTH
def test_segments_longer_than_all_slots_do_not_deadlock(transport: str) -> None:
    def body(comm: Communicator) -> bool:
        tensor = torch.full((3 << 20,), 1.0)
        comm.all_reduce(tensor, algorithm="one_shot")
        return bool((tensor == 2).all())

    assert run_ranks(body, 2, transport, segment_bytes=8 << 20, timeout=20) == [True, True]


def test_memory_that_was_dirty_is_clean_for_a_new_communicator() -> None:
    def body(comm: Communicator) -> float:
        dirty = [comm.empty(500).fill_(1.0) for _ in range(200)]
        del dirty
        gc.collect()
        child = comm.split(0)
        assert child is not None
        tensor = torch.ones(5)
        child.all_reduce(tensor)
        return tensor[0].item()

    assert run_ranks(body, 3, "shm") == [3.0] * 3


def test_a_large_message_leaves_though_its_sender_does_nothing_more() -> None:
    done = threading.Event()

    def body(comm: Communicator) -> bool:
        if comm.rank == 0:
            comm.send(torch.ones(2 << 20), 1, async_op=True)
            return done.wait(15)
        into = torch.zeros(2 << 20)
        comm.recv(into, 0)
        done.set()
        return bool((into == 1).all())

    assert run_ranks(body, 2, "shm") == [True, True]


def test_an_operation_that_is_none_is_refused_by_name() -> None:
    def body(comm: Communicator) -> None:
        comm.all_reduce(torch.ones(3), ["sum"])

    for failure in run_ranks(body, 2, "shm", return_exceptions=True):
        assert isinstance(failure, ValueError)
        assert "all_reduce: unknown reduce operation" in str(failure)


def test_a_finalizer_that_runs_while_a_block_is_taken_gives_its_own_back() -> None:
    """The garbage collector may end a tensor of a cycle inside `take`, on the thread that holds the heap's lock."""

    class Collects(list):  # type: ignore[type-arg]
        """Stands for a collection at the worst moment."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            gc.collect()
            return super().__iter__()

    descriptor, window = create(2)
    os.close(descriptor)
    heap = Heap(window)
    gc.disable()  # at no other moment
    try:
        in_a_cycle: list[object] = [heap.empty(1 << 12, torch.uint8)]
        in_a_cycle.append(in_a_cycle)
        del in_a_cycle
        heap._blocks._free = Collects(heap._blocks._free)
        assert heap.take(10) == 1 << 12
        assert heap.take(10) == 0, "given back by the finalizer"
    finally:
        gc.enable()


@BOTH
@pytest.mark.parametrize("memory", ["window", "tensor"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_broadcast_arrives_whoever_copies(memory: str, ranks: int, transport: str) -> None:
    """The root puts every second segment if the others have begun, and they fetch the rest."""

    def body(comm: Communicator) -> bool:
        tensor = comm.empty(1_000_003) if memory == "window" else torch.empty(1_000_003)
        right = True
        for turn in range(6):
            tensor.copy_(torch.arange(1_000_003.0) + turn) if comm.rank == 1 else tensor.fill_(-1.0)
            time.sleep(0.01 * ((turn + comm.rank) % 3))  # now the root is late, now the others
            comm.broadcast(tensor, 1)
            right = right and torch.equal(tensor, torch.arange(1_000_003.0) + turn)
            tensor.fill_(-2.0)  # a put that came too late would show
        return right

    assert run_ranks(body, ranks, transport) == [True] * ranks


def test_ranks_that_are_bound_to_cores_of_their_own_have_them_all() -> None:
    cores = sorted(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as elsewhere:
        os.sched_setaffinity(elsewhere.pid, {cores[-1]})
        neighbours = Neighbours(0, [0, 1], compiled=True)
        try:
            os.sched_setaffinity(0, {cores[0]})
            neighbours._processes[1] = elsewhere.pid
            assert neighbours.cores([0, 1]) == len({cores[0], cores[-1]})
            neighbours._processes[1] = 0  # in a process namespace that this one does not see
            assert neighbours.cores([0, 1]) == 1
        finally:
            os.sched_setaffinity(0, cores)
            neighbours.close()
            elsewhere.communicate(b"\n")


def test_a_report_is_found_though_its_rank_leaves_while_it_is_looked_for() -> None:
    def body(comm: Communicator) -> dict[int, str]:
        transport: Any = comm.transport
        comm.barrier()
        if comm.rank == 1:
            met.wait(10)
            transport.abort("report of 1")
            transport.close()
            met.wait(10)
            return {}
        look = transport._reports.read

        def late() -> dict[int, str]:
            """The first look comes before the report, and what follows it after the end of rank 1."""
            found = look()
            if not looked:
                looked.append(True)
                met.wait(10)
                met.wait(10)
            return found

        looked: list[bool] = []
        transport._reports.read = late
        return transport.reports(5.0)

    met = threading.Barrier(2)
    assert run_ranks(body, 2, "shm")[0] == {1: "report of 1"}


def test_memory_is_given_back_again_once_a_failed_communicator_is_closed() -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        heap = comm.transport._heap
        failed = comm.duplicate()
        with pytest.raises(CollectiveMismatch):
            failed.all_reduce(torch.ones(1 + comm.rank))
        comm.barrier()
        held = comm.empty(1 << 20)
        del held
        frozen = len(heap._held_back)
        comm.barrier()
        failed.close()
        comm.barrier()
        comm.duplicate().close()  # whatever makes or closes one lets closed ones go
        return frozen, len(heap._held_back)

    for frozen, after in run_ranks(body, 2, "shm"):
        assert frozen > 0
        assert after == 0
