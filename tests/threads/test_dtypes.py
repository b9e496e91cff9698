"""What only has to be moved may be of any dtype; what is reduced, of those that have an arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch, UnsupportedTensor
from ringred.runtime.folds import SUPPORTED
from ringred.testing import run_ranks

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def tensor_of(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """`count` elements whose bytes depend on `seed` and their places."""
    values = 2 if dtype == torch.bool else 251
    return ((torch.arange(count * dtype.itemsize) + seed) % values).to(torch.uint8).view(dtype)


def same(tensor: Tensor, expected: Tensor) -> bool:
    """Bit for bit: not every dtype can be compared."""
    return torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "cuda_ipc:fake", "torch_p2p"])
def test_every_dtype_is_moved(transport: str) -> None:
    def body(comm: Communicator) -> int:
        rank, size, right = comm.rank, comm.size, 0
        for dtype in DTYPES:
            mine = tensor_of(dtype, 5, rank)
            got = tensor_of(dtype, 5, rank)
            comm.broadcast(got, 1)
            assert same(got, tensor_of(dtype, 5, 1)), dtype
            listed = [tensor_of(dtype, 5, 99) for _ in range(size)]
            comm.all_gather(listed, mine)
            assert all(same(part, tensor_of(dtype, 5, r)) for r, part in enumerate(listed)), dtype
            listed = [tensor_of(dtype, 5, 99) for _ in range(size)]
            comm.gather(mine, listed if rank == 0 else None, 0)
            assert rank or all(same(part, tensor_of(dtype, 5, r)) for r, part in enumerate(listed)), dtype
            comm.scatter(got, [tensor_of(dtype, 5, r) for r in range(size)] if rank == 0 else None, 0)
            assert same(got, mine), dtype
            arrived = [tensor_of(dtype, 5, 99) for _ in range(size)]
            comm.all_to_all(arrived, [tensor_of(dtype, 5, 10 * rank + r) for r in range(size)])
            assert all(same(part, tensor_of(dtype, 5, 10 * r + rank)) for r, part in enumerate(arrived)), dtype
            sent = comm.send(mine, (rank + 1) % size, async_op=True)
            comm.recv(got, (rank - 1) % size)
            assert sent is not None
            sent.wait()
            assert same(got, tensor_of(dtype, 5, (rank - 1) % size)), dtype
            right += 1
        return right

    assert run_ranks(body, 3, transport) == [len(DTYPES)] * 3
    assert len(DTYPES) > 30


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint64, torch.complex32, torch.bits8])
def test_strides_are_kept(dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        spread = tensor_of(dtype, 24, comm.rank).view(4, 6)[:, ::2]
        comm.broadcast(spread, 0)
        contiguous = tensor_of(dtype, 24, 0).view(4, 6).view(torch.uint8).view(4, 6, -1)[:, ::2]
        whole = spread.as_strided((4, 6), (6, 1), 0).view(torch.uint8).view(4, 6, -1)
        assert torch.equal(whole[:, ::2], contiguous), dtype
        between = tensor_of(dtype, 24, comm.rank).view(4, 6).view(torch.uint8).view(4, 6, -1)[:, 1::2]
        assert torch.equal(whole[:, 1::2], between), "what lies between is left alone"

    run_ranks(body, 2)


def test_dtypes_of_one_width_do_not_match() -> None:
    def body(comm: Communicator) -> None:
        comm.all_gather(
            torch.empty(2, dtype=torch.uint8).view(torch.float8_e4m3fn if comm.rank else torch.float8_e5m2),
            torch.empty(1, dtype=torch.uint8).view(torch.float8_e4m3fn if comm.rank else torch.float8_e5m2),
        )

    for failure in run_ranks(body, 2, "shm", return_exceptions=True):
        assert isinstance(failure, CollectiveMismatch)
        assert "float8_e4m3fn" in str(failure)
        assert "float8_e5m2" in str(failure)


def test_an_output_of_another_dtype_is_refused_before_anything_is_sent() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=r"share 0 of output expected 1 elements of torch.float8_e5m2, got 1 of"):
            comm.all_gather(
                torch.empty(1, dtype=torch.uint8).view(torch.float8_e4m3fn),
                torch.empty(1, dtype=torch.uint8).view(torch.float8_e5m2),
            )

    run_ranks(body, 1)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in SUPPORTED], ids=str)
def test_what_has_no_arithmetic_is_not_reduced(dtype: torch.dtype) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(UnsupportedTensor, match=f"rank 0: all_reduce: dtype {dtype} is not supported"):
            comm.all_reduce(tensor_of(dtype, 2, 0))

    run_ranks(body, 1)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_a_quantized_tensor_is_refused() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(UnsupportedTensor, match="quantized"):
            comm.broadcast(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), 0)

    run_ranks(body, 1)
