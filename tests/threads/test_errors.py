"""What goes wrong is said on every rank, with the ranks and the collective in it, and nothing hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ringred
from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch, CollectiveTimeout, PeerFailed, RingredError
from ringred.testing import run_ranks

Body = Callable[[Communicator], object]


def call(comm: Communicator, path: str, tensor: torch.Tensor, op: str = "sum", **options: object) -> None:
    """One all-reduce on the path: synchronous, asynchronous, or in backward behind a bucket."""
    if path == "sync":
        comm.all_reduce(tensor, op, **options)  # type: ignore[call-overload]
    elif path == "async":
        comm.all_reduce(tensor, op, async_op=True, **options).wait()  # type: ignore[call-overload]
    else:
        in_backward(comm, lambda: comm.all_reduce(tensor, op, **options))  # type: ignore[call-overload]


def in_backward(comm: Communicator, action: Callable[[], object]) -> None:
    """Runs a synchronised backward through DDP, with `action` called from inside it."""
    model = ringred.DistributedDataParallel(nn.Linear(4, 2), process_group=comm)
    output = model(torch.ones(3, 4))
    output.register_hook(lambda gradient: action() and None)
    output.sum().backward()


def caught(body: Body, size: int, transport: str, timeout: float = 5.0) -> list[BaseException]:
    """What each rank raised; every rank has to raise, in time."""
    began = time.monotonic()
    results = run_ranks(body, size, transport, timeout=timeout, return_exceptions=True)
    assert time.monotonic() - began < timeout + 5
    assert all(isinstance(result, BaseException) for result in results), results
    return results  # type: ignore[return-value]


PATHS = pytest.mark.parametrize("path", ["sync", "async", "backward"])
TRANSPORTS = pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "cuda_ipc:fake", "torch_p2p"])


@TRANSPORTS
@PATHS
@pytest.mark.parametrize("what", ["shape", "dtype", "op", "algorithm", "collective"])
def test_ranks_that_do_not_make_the_same_call(what: str, path: str, transport: str) -> None:
    def body(comm: Communicator) -> None:
        odd = comm.rank == 1
        if what == "shape":
            call(comm, path, torch.ones(7 if odd else 9))
        elif what == "dtype":
            call(comm, path, torch.ones(9, dtype=torch.int32 if odd else torch.float32))
        elif what == "op":
            call(comm, path, torch.ones(9), "max" if odd else "sum")
        elif what == "algorithm":
            call(comm, path, torch.ones(9), algorithm="ring" if odd else "direct")
        elif odd and path == "backward":
            in_backward(comm, lambda: comm.broadcast(torch.ones(9), 1))
        elif odd:
            work = comm.broadcast(torch.ones(9), 1, async_op=path == "async")
            if work is not None:
                work.wait()
            comm.barrier()  # a root may be done; then the next call on the communicator raises
        else:
            call(comm, path, torch.ones(9))

    for rank, error in enumerate(caught(body, 3, transport)):
        assert isinstance(error, CollectiveMismatch), error
        assert isinstance(error, RuntimeError)
        text = str(error)
        assert f"rank {rank}" in text
        if path != "backward" or what != "collective":
            assert "all_reduce" in text
        assert "test_errors.py" in text


@TRANSPORTS
@PATHS
def test_a_rank_that_raises(path: str, transport: str) -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 2:
            raise ZeroDivisionError("no batch left")
        call(comm, path, torch.ones(9))

    errors = caught(body, 3, transport)
    assert isinstance(errors[2], ZeroDivisionError)
    for rank in (0, 1):
        assert isinstance(errors[rank], PeerFailed)
        assert isinstance(errors[rank], ConnectionError)
        assert "rank 2 raised ZeroDivisionError: no batch left" in str(errors[rank])
        assert f"rank {rank}: " in str(errors[rank])


@TRANSPORTS
@PATHS
def test_a_rank_that_does_not_come(path: str, transport: str) -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            time.sleep(1.6)
        call(comm, path, torch.ones(9))

    errors = caught(body, 3, transport, timeout=1.0)
    for rank in (0, 2):
        assert isinstance(errors[rank], CollectiveTimeout)
        assert isinstance(errors[rank], TimeoutError)
        assert "rank 1 did not take part" in str(errors[rank])
    assert isinstance(errors[1], RingredError), "the late one finds the communicator given up"


@TRANSPORTS
def test_a_rank_that_leaves(transport: str) -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 0:
            comm.close()
            raise KeyboardInterrupt
        comm.all_reduce(torch.ones(3))

    errors = caught(body, 3, transport)
    for rank in (1, 2):
        assert isinstance(errors[rank], PeerFailed)
        assert "rank 0" in str(errors[rank])


def test_a_failed_communicator_stays_unusable_and_says_since_when() -> None:
    def body(comm: Communicator) -> list[str]:
        texts = []
        for _ in range(2):
            with pytest.raises(CollectiveMismatch) as raised:
                comm.all_reduce(torch.ones(2 + comm.rank))
            texts.append(str(raised.value))
        return texts

    for rank, (first, second) in enumerate(run_ranks(body, 2)):
        assert "the ranks did not make the same call" in first
        assert second.startswith(f"rank {rank}: all_reduce")
        assert "unusable since an earlier failure" in second


def test_a_collective_in_vain_on_a_closed_communicator() -> None:
    def body(comm: Communicator) -> str:
        comm.barrier()
        comm.close()
        comm.close()
        with pytest.raises(PeerFailed) as raised:
            comm.barrier()
        return str(raised.value)

    assert all("this communicator is closed" in text for text in run_ranks(body, 2))


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (
            lambda c: c.all_reduce(torch.ones(3), algorithm="rnig"),
            ValueError,
            r"rank .: all_reduce: .*no algorithm 'rnig' \(did you mean 'ring'\?\); there are",
        ),
        (
            lambda c: c.all_reduce(torch.ones(3), algorithm="torus", grid=(3, 2)),
            ValueError,
            "rank .: all_reduce: grid 3x2 holds 6 ranks, expected 2",
        ),
        (lambda c: c.all_reduce(torch.ones(3), algorithm="ring", grid=(2, 1)), ValueError, "takes no grid"),
        (lambda c: c.all_reduce(torch.ones(3), algorithm="native"), ValueError, "has no all-reduce of its own"),
        (
            lambda c: c.all_reduce(torch.ones(3).to_sparse()),
            TypeError,
            "expected a dense .* got layout torch.sparse_coo",
        ),
        (
            lambda c: c.all_reduce(torch.ones(3, device="meta")),
            TypeError,
            "expected tensors of the CPU or of CUDA, got them on meta",
        ),
        (lambda c: c.all_reduce(torch.ones(1).expand(4)), TypeError, "expected memory of its own .* got an expanded"),
        (lambda c: c.all_reduce([1.0]), TypeError, "expected a tensor, got list"),
        (
            lambda c: c.all_reduce(torch.ones(3, dtype=torch.int32), "avg"),
            TypeError,
            "avg does not go with torch.int32",
        ),
        (lambda c: c.all_reduce(torch.ones(3, dtype=torch.complex64), "max"), TypeError, "max does not go with"),
        (
            lambda c: c.all_reduce(torch.ones(3), "mean"),
            ValueError,
            "rank .: all_reduce: unknown reduce operation 'mean'",
        ),
        (lambda c: c.broadcast(torch.ones(3), 2), ValueError, "src 2 is no rank of 0..1"),
        (lambda c: c.all_gather(torch.ones(5), torch.ones(3)), ValueError, "expected a multiple of 2 elements, got 5"),
        (lambda c: c.all_gather(torch.ones(4), torch.ones(3)), ValueError, "share . of output expected 3 elements"),
        (lambda c: c.all_gather([torch.ones(3)], torch.ones(3)), ValueError, "expected 2 tensors, got 1"),
        (lambda c: c.reduce_scatter(torch.ones(2), torch.ones(6)), ValueError, "output expected 3 elements"),
        (lambda c: c.gather(torch.ones(2), None, c.rank), ValueError, "expected an output, got None"),
        (lambda c: c.scatter(torch.ones(2), torch.ones(4), 1 - c.rank), ValueError, "expected None here"),
        (lambda c: c.send(torch.ones(2), c.rank), ValueError, "to or from itself"),
        (lambda c: c.split(-1), ValueError, "expected a color ≥ 0 or None, got -1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(body: Body, kind: type, message: str) -> None:
    def refused(comm: Communicator) -> bool:
        with pytest.raises(kind, match=message):
            body(comm)
        tensor = torch.ones(4)
        comm.all_reduce(tensor)  # and the communicator is as good as before
        return tensor.sum().item() == 8

    assert run_ranks(refused, 2) == [True, True]


@PATHS
@pytest.mark.parametrize(
    ("options", "tensor", "kind", "message"),
    [
        ({"algorithm": "rnig"}, torch.ones(3), ValueError, "rank .: all_reduce: .*no algorithm 'rnig'"),
        (
            {"algorithm": "torus", "grid": (3, 2)},
            torch.ones(3),
            ValueError,
            "rank .: all_reduce: grid 3x2 holds 6 ranks, expected 2",
        ),
        ({}, torch.ones(3).to_sparse(), TypeError, "rank .: all_reduce: expected a dense"),
    ],
)
def test_bad_arguments_on_every_path(
    path: str, options: dict[str, object], tensor: torch.Tensor, kind: type, message: str
) -> None:
    def body(comm: Communicator) -> bool:
        with pytest.raises(kind, match=message):
            call(comm, path, tensor, **options)
        after = torch.ones(4)
        comm.all_reduce(after)
        return after.sum().item() == 8

    assert run_ranks(body, 2) == [True, True]


def test_bad_arguments_of_ddp_are_refused_at_construction_on_every_rank() -> None:
    def body(comm: Communicator) -> list[str]:
        texts = []
        for options in ({"algorithm": "rnig"}, {"algorithm": "torus", "grid": (3, 2)}):
            with pytest.raises(ValueError, match=r"rnig|3x2") as raised:
                ringred.DistributedDataParallel(nn.Linear(2, 2), process_group=comm, **options)
            texts.append(str(raised.value))
        return texts

    for unknown, grid in run_ranks(body, 2):
        assert "no algorithm 'rnig' (did you mean 'ring'?); there are" in unknown
        assert "all_reduce: grid 3x2 holds 6 ranks, expected 2" in grid


def test_waiting_for_a_work_has_a_limit_of_its_own() -> None:
    def body(comm: Communicator) -> str:
        if comm.rank == 1:
            time.sleep(0.6)
            comm.all_reduce(torch.ones(3))
            return ""
        work = comm.all_reduce(torch.ones(3), async_op=True)
        assert not work.is_completed()
        assert work.exception() is None
        with pytest.raises(CollectiveTimeout) as raised:
            work.wait(0.1)
        work.wait()  # the collective itself was still in flight, and ends well
        return str(raised.value)

    assert "all_reduce #1" in run_ranks(body, 2)[0]


def test_ranks_that_need_a_launcher_are_refused() -> None:
    with pytest.raises(ValueError, match="'shm:mixed', 'cuda_ipc:fake', 'staged:fake' or 'torch_p2p', got 'mpi'"):
        run_ranks(lambda comm: None, 2, "mpi")


@TRANSPORTS
def test_closing_finishes_what_was_started(transport: str) -> None:
    def body(comm: Communicator) -> list[float]:
        tensors = [torch.ones(100_000) for _ in range(6)]
        works = [comm.all_reduce(tensor, async_op=True) for tensor in tensors]
        comm.close()
        assert [work.exception() for work in works] == [None] * 6
        return [tensor[0].item() for tensor in tensors]

    assert run_ranks(body, 2, transport) == [[2.0] * 6] * 2


def test_a_callback_may_start_but_not_wait() -> None:
    def body(comm: Communicator) -> tuple[list[BaseException], float]:
        caught: list[BaseException] = []
        tensor = torch.ones(1)

        def callback() -> None:
            try:
                comm.barrier()
            except RingredError as refusal:
                caught.append(refusal)
            started.append(comm.all_reduce(tensor, async_op=True))

        started: list[object] = []
        work = comm.barrier(async_op=True)
        work.on_done(callback)
        work.wait()
        while not started:
            time.sleep(0.001)
        started[0].wait()  # type: ignore[attr-defined]
        return caught, tensor.item()

    for caught, total in run_ranks(body, 2):
        # Where the work was done before the callback was set, it ran on this thread, and could wait.
        assert all("called from a callback on the progress thread" in str(error) for error in caught)
        assert total == 2.0


@TRANSPORTS
def test_a_failure_reaches_those_who_wait_in_a_part_of_the_ranks(transport: str) -> None:
    def body(comm: Communicator) -> None:
        part = comm.split(0)
        assert part is not None
        comm.barrier()
        if comm.rank == 1:
            raise ZeroDivisionError("no batch left")
        part.all_reduce(torch.ones(3))

    errors = caught(body, 3, transport, timeout=10)
    for rank in (0, 2):
        assert isinstance(errors[rank], PeerFailed)
        assert "raised ZeroDivisionError: no batch left" in str(errors[rank])


def test_a_failure_that_nobody_waited_for_is_printed_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    def body(comm: Communicator) -> None:
        comm.all_reduce(torch.ones(2 + comm.rank), async_op=True)
        comm.close()

    run_ranks(body, 2)
    said = capfd.readouterr().err
    assert said.count("nobody waited for it") == 2
    assert "the ranks did not make the same call" in said


def test_part_of_the_ranks_outlives_the_whole() -> None:
    def body(comm: Communicator) -> float:
        part = comm.split(0)
        assert part is not None
        comm.barrier()
        comm.close()
        tensor = torch.ones(3)
        part.all_reduce(tensor)
        part.close()
        return tensor[0].item()

    for transport in ("local", "shm", "torch_p2p"):
        assert run_ranks(body, 2, transport) == [2.0, 2.0]
