"""RINGRED_CHECK=sites: calls of the same shape at different places of the program do not meet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ringred
from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch
from ringred.runtime.config import Config
from ringred.testing import run_ranks


def swapped(comm: Communicator) -> float:
    """Two tensors of one shape, reduced in another order on the last rank."""
    first, second = torch.full((5,), 1.0), torch.full((5,), 10.0)
    if comm.rank < comm.size - 1:
        comm.all_reduce(first)
        comm.all_reduce(second)
    else:
        comm.all_reduce(second)
        comm.all_reduce(first)
    return first[0].item()


@pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "torch_p2p"])
def test_calls_in_another_order_are_an_error_that_names_both_places(transport: str) -> None:
    failures = run_ranks(swapped, 3, transport, sites=True, return_exceptions=True)
    for failure in failures:
        assert isinstance(failure, CollectiveMismatch), failure
    lines = [swapped.__code__.co_firstlineno + offset for offset in (4, 7)]
    told = str(failures[0])
    assert "the ranks did not make the same call" in told
    assert f"rank 2 all_reduce #1 (sum, float32, 5 elements, one_shot) at {__file__}:{lines[1]}" in told
    assert f"test_sites.py:{lines[0]}" in told


def test_without_it_they_meet() -> None:
    assert run_ranks(swapped, 3, "shm")[0] == 12.0


@pytest.mark.parametrize("transport", ["local", "shm"])
def test_a_training_that_is_in_order_goes_through(transport: str) -> None:
    def body(comm: Communicator) -> torch.Tensor:
        torch.manual_seed(comm.rank)
        inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        model = ringred.DistributedDataParallel(inner, process_group=comm, bucket_cap_mb=0.0003)
        for step in range(3):
            model(torch.full((4, 8), float(comm.rank + step))).sum().backward()
            work = comm.all_reduce(torch.ones(3), async_op=True)
            comm.barrier()
            work.wait()
        part = comm.split(comm.rank % 2)
        part.all_reduce(torch.ones(2))
        part.close()
        if comm.rank == 0:
            comm.send(torch.ones(3), 1)  # calls of two ranks are made at two places
        elif comm.rank == 1:
            comm.recv(torch.ones(3), 0)
        return next(inner.parameters()).detach().clone()

    first, *others = run_ranks(body, 3, transport, sites=True)
    assert all(torch.equal(first, other) for other in others)


def test_the_variable() -> None:
    assert Config.from_environment({"RINGRED_CHECK": "sites"}).sites
    assert not Config.from_environment({"RINGRED_CHECK": "arguments"}).sites
    with pytest.raises(ValueError, match="RINGRED_CHECK: expected one of sites, arguments, got 'all'"):
        Config.from_environment({"RINGRED_CHECK": "all"})
