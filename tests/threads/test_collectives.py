"""The whole table on ranks that are threads, and what counters, orders and bits say."""

from __future__ import annotations

import functools

import pytest
import torch

from ringred.collectives.registry import algorithms, lookup
from ringred.communicator import Communicator
from ringred.runtime.executor import Piece, bind, run
from ringred.runtime.folds import Folder, ReduceOp
from ringred.runtime.select import share_bounds
from ringred.schedule.lower import lower
from ringred.testing import run_ranks
from tests.table import check_all_reduce, check_others

ALGORITHMS = [
    "central",
    "direct",
    "double_tree",
    "halving_doubling",
    "hierarchical",
    "one_shot",
    "ring",
    "torus",
    "tree",
]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_every_all_reduce_over_memory(size: int) -> None:
    counts = run_ranks(check_all_reduce, size, slots=2 if size % 2 else None)
    assert counts == [68 * 5 * 9] * size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "cuda_ipc:fake", "torch_p2p"])
def test_every_other_collective(size: int, transport: str) -> None:
    assert all(run_ranks(check_others, size, transport))


def payload(comm: Communicator, name: str, grid: tuple[int, ...] | None, count: int) -> tuple[int, int]:
    before = (comm.counters.bytes_sent, comm.counters.bytes_received)
    comm.all_reduce(torch.ones(count), algorithm=name, grid=grid)
    return comm.counters.bytes_sent - before[0], comm.counters.bytes_received - before[1]


BANDWIDTH_OPTIMAL = [
    *(("ring", size, None) for size in (2, 3, 5, 8)),
    *(("direct", size, None) for size in (2, 3, 5, 8)),
    *(("halving_doubling", size, None) for size in (2, 4, 8)),
    ("torus", 4, (2, 2)),
    ("torus", 6, (2, 3)),
    ("torus", 16, (4, 4)),
]


@pytest.mark.parametrize(
    ("transport", "name", "size", "grid"),
    [
        *(("local", *case) for case in BANDWIDTH_OPTIMAL),
        *(("torch_p2p", *case) for case in BANDWIDTH_OPTIMAL if case[1] <= 6),
    ],
)
def test_ranks_send_2_p_minus_1_over_p_of_the_data(
    transport: str, name: str, size: int, grid: tuple[int, ...] | None
) -> None:
    count = 10_007
    moved = run_ranks(functools.partial(payload, name=name, grid=grid, count=count), size, transport)
    chunks = 2 * (size - 1)
    for sent, received in moved:
        assert abs(sent - 2 * (size - 1) / size * count * 4) <= 4 * chunks
        assert abs(received - 2 * (size - 1) / size * count * 4) <= 4 * chunks


def test_the_centre_of_central_moves_everything() -> None:
    moved = run_ranks(functools.partial(payload, name="central", grid=None, count=1000), 5)
    assert sum(moved[0]) == 2 * 4000 * 4
    assert moved[1] == (4000, 4000)


def test_all_ranks_hold_the_same_bits_whatever_the_order_of_addition() -> None:
    def body(comm: Communicator) -> list[bytes]:
        out = []
        for name in ALGORITHMS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
                real = torch.randn(1001, generator=torch.Generator().manual_seed(comm.rank))
                tensor = real.to(dtype)
                comm.all_reduce(tensor, algorithm=name)
                out.append(tensor.view(torch.uint8).numpy().tobytes())
        return out

    for size in (2, 3, 6, 7):
        results = run_ranks(body, size)
        assert all(result == results[0] for result in results), size
        assert run_ranks(body, size) == results, "and the same from run to run"


def test_rank_ordered_algorithms_agree_to_the_bit_and_accumulate_in_float32() -> None:
    def body(comm: Communicator) -> tuple[bytes, torch.Tensor]:
        given = torch.randn(999, generator=torch.Generator().manual_seed(comm.rank)).to(torch.bfloat16)
        results = []
        for name in ("direct", "one_shot", "central"):
            tensor = given.clone()
            comm.all_reduce(tensor, algorithm=name)
            results.append(tensor)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        return results[0], given

    results = run_ranks(body, 5)
    total = torch.zeros(999)
    for _, given in results:
        total += given.float()
    assert torch.equal(results[0][0], total.to(torch.bfloat16))


def test_the_mean_of_float16_does_not_overflow_where_the_sum_does() -> None:
    def body(comm: Communicator) -> list[float]:
        means = []
        for name in ALGORITHMS:
            tensor = torch.full((10,), 40_000.0, dtype=torch.float16)
            comm.all_reduce(tensor, "avg", algorithm=name)
            means.append(tensor[0].item())
        scattered = torch.empty(3, dtype=torch.float16)
        comm.reduce_scatter(scattered, torch.full((3 * comm.size,), 40_000.0, dtype=torch.float16), "avg")
        return [*means, scattered[0].item()]

    assert run_ranks(body, 4) == [[40_000.0] * 10] * 4


def test_tensors_of_any_layout_and_autograd_leaves() -> None:
    def body(comm: Communicator) -> bool:
        base = torch.arange(24.0).reshape(4, 6)
        for view in (base.clone().t(), base.clone()[:, ::2], base.clone()[1], base.clone().expand(2, 4, 6).clone()):
            wanted = view.clone() * comm.size
            comm.all_reduce(view, algorithm="ring")
            assert torch.equal(view, wanted)
        leaf = torch.ones(5, requires_grad=True)
        comm.all_reduce(leaf)
        assert leaf.requires_grad
        assert leaf.grad_fn is None
        assert leaf.sum().item() == 5 * comm.size
        conjugate = torch.tensor([1 + 2j, 3 - 1j]).conj()
        comm.all_reduce(conjugate)
        assert torch.equal(conjugate.resolve_conj(), torch.tensor([1 - 2j, 3 + 1j]) * comm.size)
        columns = torch.empty(comm.size, 3).t()
        comm.all_gather(columns, torch.full((3,), float(comm.rank)))
        assert columns.sum().item() == 3 * sum(range(comm.size))
        return True

    assert all(run_ranks(body, 3))


def test_one_element_segments_cross_a_ring_in_order() -> None:
    def body(comm: Communicator) -> torch.Tensor:
        tensor = torch.arange(101.0) * (comm.rank + 1)
        comm.all_reduce(tensor, algorithm="ring")
        return tensor

    for result in run_ranks(body, 4, segment_bytes=4):
        assert torch.equal(result, torch.arange(101.0) * 10)


def test_the_executor_runs_by_itself() -> None:
    """Schedule, lowering, memory, transport: nothing else is needed."""

    def body(comm: Communicator) -> torch.Tensor:
        entry = lookup("all_reduce", "torus")
        group = entry.group(comm.size, grid=(3, 2))
        program = lower(comm.rank, entry.steps(group)(comm.rank), share_bounds(50, 6), 7)
        data = torch.arange(50) + comm.rank
        plan = bind(program, [Piece(0, data)], Folder(ReduceOp.SUM, torch.int64, comm.size))
        for _ in range(3):
            run(plan, comm.transport, 1, 1, 20 * 10**9)
        return data

    once = sum(torch.arange(50) + rank for rank in range(6))
    for result in run_ranks(body, 6):
        assert torch.equal(result, once * 36)


def test_shares_of_any_lengths_in_any_order_of_their_owners() -> None:
    """Empty shares make neighbours of units that lie in different tensors."""

    def body(comm: Communicator) -> bool:
        for lengths in ([0, 1, 0, 1], [1, 0, 7, 7], [3, 0, 2, 1], [0, 0, 0, 5]):
            for name in ("auto", "torus", "ring", "direct"):
                outputs = [torch.full((length,), -1.0) for length in lengths]
                comm.all_gather(outputs, torch.full((lengths[comm.rank],), comm.rank + 1.0), algorithm=name)
                assert [o.tolist() for o in outputs] == [[r + 1.0] * n for r, n in enumerate(lengths)], (name, lengths)
        return True

    assert all(run_ranks(body, 4))


def test_a_single_element_with_an_odd_stride() -> None:
    def body(comm: Communicator) -> list[float]:
        for length in (0, 1):
            tensor = torch.full((9,), float(comm.rank))[1::2][:length]
            comm.broadcast(tensor, 1)
            assert tensor.tolist() == [1.0] * length
        return tensor.tolist()

    assert run_ranks(body, 2, "torch_p2p") == [[1.0], [1.0]]


@pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "cuda_ipc:fake", "staged:fake"])
def test_a_reduce_scatter_leaves_its_input_as_it_was(transport: str) -> None:
    """Some algorithms write to no share but the rank's own and go without a copy of the input; none may show it."""

    def body(comm: Communicator) -> None:
        rank, size = comm.rank, comm.size
        lengths = [700 * peer + 3 for peer in range(size)]
        for name in sorted(algorithms("reduce_scatter")):
            for op, dtype, factor in (
                ("sum", torch.float32, 1.0),
                ("avg", torch.float32, 1.0 / size),
                ("avg", torch.float16, 1.0 / size),
            ):
                whole = comm.empty(size * 50_001, dtype).fill_(rank + 1.0)
                listed = [torch.full((length,), float(rank + peer), dtype=dtype) for peer, length in enumerate(lengths)]
                for given, expected in (
                    (whole, sum(range(1, size + 1)) * factor),
                    (listed, sum(peer + rank for peer in range(size)) * factor),
                ):
                    before = given.clone() if isinstance(given, torch.Tensor) else [share.clone() for share in given]
                    output = torch.empty(50_001 if given is whole else lengths[rank], dtype=dtype)
                    comm.reduce_scatter(output, given, op, algorithm=name)
                    assert torch.allclose(output.float(), torch.tensor(expected), rtol=1e-3), (name, op, dtype)
                    same = zip(
                        [given] if given is whole else given, [before] if given is whole else before, strict=True
                    )
                    assert all(torch.equal(now, then) for now, then in same), (name, op, dtype)
                for at in (slice(0, 50_001), slice(-50_001, None)):  # ... or where another share is
                    overlapped = whole.clone() if rank else comm.empty(whole.numel(), dtype).copy_(whole)
                    comm.reduce_scatter(overlapped[at], overlapped, op, algorithm=name)
                    assert torch.allclose(
                        overlapped[at].float(), torch.tensor(sum(range(1, size + 1)) * factor), rtol=1e-3
                    )
                same = comm.empty(1000, dtype).fill_(rank + 1.0)
                comm.reduce_scatter(same, [same] * size, op, algorithm=name)
                assert torch.allclose(same.float(), torch.tensor(sum(range(1, size + 1)) * factor), rtol=1e-3)
                own = whole[rank * 50_001 : (rank + 1) * 50_001]  # in place, as torch allows
                comm.reduce_scatter(own, whole, op, algorithm=name)
                assert torch.allclose(own.float(), torch.tensor(sum(range(1, size + 1)) * factor), rtol=1e-3)

    for size in (2, 3, 4):
        run_ranks(body, size, transport)


@pytest.mark.parametrize("transport", ["local", "shm", "cuda_ipc:fake"])
def test_some_ranks_form_a_communicator_without_the_others(transport: str) -> None:
    def body(comm: Communicator) -> list[int] | None:
        if comm.rank == 1:
            return None  # it need not even know
        part = comm.subset([2, 0], "the two", timeout=7.0)
        assert (part.rank, part.size, part.config.timeout) == ([2, 0].index(comm.rank), 2, 7.0)
        gathered = torch.empty(2, dtype=torch.int64)
        part.all_gather(gathered, torch.tensor([comm.rank]))
        part.set_timeout(9.0)
        assert part.config.timeout == 9.0
        part.close()
        return gathered.tolist()

    assert run_ranks(body, 3, transport) == [[2, 0], None, [2, 0]]
