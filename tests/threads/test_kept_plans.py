"""Plans that are kept for the next call: what they hold, where their tensors went meanwhile, and what they refuse."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from ringred.communicator import Communicator
from ringred.errors import CollectiveTimeout, PeerFailed, RingredError, UnsupportedTensor
from ringred.testing import run_ranks

MEMORY = pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "cuda_ipc:fake"])


@MEMORY
def test_a_list_that_is_emptied_meanwhile_keeps_its_tensors_until_the_work_is_done(transport: str) -> None:
    def body(comm: Communicator) -> bool:
        for _ in range(5):
            outputs: list[torch.Tensor] = [torch.zeros(100_000) for _ in range(comm.size)]
            kept = [output.untyped_storage() for output in outputs] if comm.rank else []
            time.sleep(0.05 * comm.rank)
            work = comm.all_gather(outputs, torch.full((100_000,), comm.rank + 1.0), async_op=True)
            if comm.rank == 0:
                outputs.clear()
                fresh = [torch.zeros(100_000) for _ in range(4)]
                assert work is not None
                work.wait()
                if any(tensor.any() for tensor in fresh):
                    return False
            else:
                assert work is not None
                work.wait()
                if not all((output == rank + 1).all() for rank, output in enumerate(outputs)):
                    return False
            del kept
        return True

    assert run_ranks(body, 2, transport) == [True, True]


@MEMORY
@pytest.mark.parametrize("how", ["shared", "made anew"])
def test_a_prepared_all_reduce_follows_its_tensor_to_other_memory(transport: str, how: str) -> None:
    def body(comm: Communicator) -> list[float]:
        tensor = torch.ones(1000)
        prepared = comm.all_reduce_init(tensor)
        prepared.start().wait()
        if how == "shared":
            tensor.share_memory_()
        else:
            nbytes = tensor.nbytes
            tensor.untyped_storage().resize_(0)
            with pytest.raises(UnsupportedTensor, match="which has no memory"):
                prepared.start()
            tensor.untyped_storage().resize_(nbytes)
        tensor.fill_(3.0)
        prepared.start().wait()
        return tensor.unique().tolist()

    assert run_ranks(body, 2, transport) == [[6.0], [6.0]]


@MEMORY
def test_what_was_kept_in_inference_mode_works_outside_of_it(transport: str) -> None:
    def body(comm: Communicator) -> list[float]:
        whole, share = torch.ones(8), torch.ones(8 // comm.size)
        half, numbers = torch.ones(8, dtype=torch.float16), torch.ones(8, dtype=torch.complex64)

        def all_of_them() -> None:
            comm.barrier()
            comm.reduce(share)
            comm.reduce_scatter(share, whole)
            comm.all_gather(whole, share)
            comm.all_reduce(whole)
            comm.all_reduce(half, "avg")
            comm.all_reduce(numbers, "prod")

        with torch.inference_mode():
            all_of_them()
        all_of_them()
        return [*whole.tolist(), *half.tolist()]

    assert run_ranks(body, 2, transport) == run_ranks(body, 2, "local")


@MEMORY
def test_tensors_without_memory_and_outputs_that_overlap_their_input_are_refused(transport: str) -> None:
    def body(comm: Communicator) -> bool:
        tensor = torch.ones(100)
        tensor.untyped_storage().resize_(0)
        for one in (tensor, torch._efficientzerotensor(10)):  # type: ignore[attr-defined]
            with pytest.raises(UnsupportedTensor, match="with memory, got one without"):
                comm.all_reduce(one)
        shorter = torch.ones(100)
        shorter.untyped_storage().resize_(200)
        with pytest.raises(UnsupportedTensor, match="expected 400 bytes of memory, got a tensor whose storage has 200"):
            comm.broadcast(shorter)
        whole = torch.ones(16)
        with pytest.raises(ValueError, match="all_gather: expected an output apart from its input"):
            comm.all_gather(whole, whole[4:12])
        return True

    assert run_ranks(body, 2, transport) == [True, True]


@pytest.mark.parametrize("transport", ["shm", "shm:python"])
def test_a_timeout_says_how_long_it_was_in_a_call_that_was_made_before(transport: str) -> None:
    def body(comm: Communicator) -> None:
        tensor = torch.ones(4)
        comm.set_timeout(1e10)  # more than a number of nanoseconds holds
        comm.all_reduce(tensor)
        comm.all_reduce(tensor)
        comm.set_timeout(0.5)
        if comm.rank == 0:
            try:
                comm.all_reduce(tensor)
            finally:
                over.set()
        over.wait(20)

    over = threading.Event()
    failure = run_ranks(body, 2, transport, return_exceptions=True)[0]
    assert isinstance(failure, CollectiveTimeout)
    assert "within the timeout of 0.5 s" in str(failure)


@pytest.mark.parametrize("transport", ["shm", "shm:python"])
def test_a_death_that_is_told_during_another_wait_is_not_forgotten(transport: str) -> None:
    def body(comm: Communicator) -> str:
        tensor = torch.ones(4)
        if comm.rank == 2:
            time.sleep(1.5)
        elif comm.rank == 1:
            time.sleep(0.6)
            comm.send(tensor, 0)
        else:
            neighbours = comm.transport._neighbours  # type: ignore[attr-defined]
            threading.Timer(0.2, lambda: neighbours._lose(2)).start()
            comm.recv(tensor, 1)
            began = time.monotonic()
            with pytest.raises(PeerFailed, match="rank 2 is gone"):
                comm.recv(tensor, 2)
            assert time.monotonic() - began < 5
        return "done"

    assert run_ranks(body, 3, transport, timeout=20, return_exceptions=True)[0] == "done"


def test_a_signal_handler_may_not_call_in_the_middle_of_a_call() -> None:
    """The main thread is a rank, which a signal reaches while it waits."""
    said: list[str] = []

    def other(comm: Communicator) -> None:
        time.sleep(1.0)
        comm.all_reduce(torch.ones(4))

    from ringred.testing.ranks import connect

    make = connect("shm", 2)
    thread = threading.Thread(target=lambda: other(Communicator(make(1))), daemon=True)
    thread.start()
    comm = Communicator(make(0))

    def handler(number: int, frame: object) -> None:
        for async_op in (False, True):
            try:
                comm.all_reduce(torch.ones(4), async_op=async_op)
            except RingredError as failure:
                said.append(str(failure))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        tensor = torch.ones(4)
        comm.all_reduce(tensor)
    finally:
        signal.signal(signal.SIGALRM, before)
    thread.join()
    assert tensor.tolist() == [2.0] * 4
    assert len(said) == 2
    assert all("called in the middle of all_reduce #1" in text for text in said)
