"""Parameters that ranks change in shared memory without locks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.errors import UnsupportedTensor
from ringred.parameter_server.hogwild import Hogwild
from ringred.testing import run_ranks

_seeding = threading.Lock()


def make_table(rank: int) -> nn.Embedding:
    with _seeding:
        torch.manual_seed(rank)
        return nn.Embedding(40, 3, sparse=True)


def test_sparse_steps_on_rows_of_their_own_are_all_there() -> None:
    def body(comm: ringred.Communicator) -> tuple[Tensor, Tensor, int]:
        table = make_table(comm.rank)
        before = make_table(0).weight.detach().clone()
        private = table.weight.data_ptr()
        with Hogwild(table, lr=1.0, comm=comm) as hogwild:
            assert torch.equal(table.weight, before), "it starts at rank 0's values"
            comm.barrier()
            for step in range(200):
                rows = torch.tensor([comm.rank + 4 * (step % 10), comm.rank])  # the second may be the first again
                table(rows).sum().backward()
                hogwild.step()
                assert table.weight.grad is None
            total = hogwild.total_steps()
        assert table.weight.data_ptr() == private
        return before, table.weight.detach().clone(), total

    found = run_ranks(body, 4, "shm")
    before, after, total = found[0]
    assert total == 800
    moved = torch.zeros(40, 1)
    for rank in range(4):
        for step in range(200):
            moved[rank + 4 * (step % 10)] += 1
            moved[rank] += 1
    torch.testing.assert_close(before - after, moved.expand(40, 3), rtol=0, atol=1e-3)
    assert all(torch.equal(after, other) for _, other, _ in found)


def test_dense_steps_and_parameters_without_gradient() -> None:
    def body(comm: ringred.Communicator) -> float:
        module = nn.Module()
        module.used = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        module.empty = nn.Parameter(torch.zeros(0, 3))
        module.unused = nn.Parameter(torch.ones(2))
        with Hogwild(module, lr=0.5, comm=comm) as hogwild:
            if comm.rank == 1:
                for _ in range(10):
                    module.used.grad = torch.ones(5, dtype=torch.float64)
                    hogwild.step()
        assert torch.equal(module.unused, torch.ones(2))
        return module.used[0].item()

    assert run_ranks(body, 2) == [-5.0, -5.0]


def test_what_cannot_be_shared_is_refused() -> None:
    def body(comm: ringred.Communicator) -> None:
        with pytest.raises(UnsupportedTensor, match="rank 0: 'weight': expected a dense CPU tensor"):
            Hogwild(nn.Linear(2, 2, device="meta"), lr=0.1, comm=comm)
        with pytest.raises(ValueError, match="no parameter requires a gradient"):
            Hogwild([], lr=0.1, comm=comm)

    run_ranks(body, 1)
