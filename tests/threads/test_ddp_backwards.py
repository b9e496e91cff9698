"""Which backward of which forward is reduced: several of them, beside the wrapper, copies, gradients that come late."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ringred
from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch
from ringred.optim import ShardedOptimizer
from ringred.testing import run_ranks
from tests.threads.wrapping import MODEL, backward, batch, gradients, wrapped


def test_each_backward_of_one_forward_is_reduced() -> None:
    """In torch the second one stays local, and replicas drift apart."""

    def body(comm: Communicator) -> list[Tensor]:
        model, other = wrapped(comm), wrapped(comm)
        inputs, _ = batch(comm.rank)
        outputs = model(inputs)
        outputs[:, 0].sum().backward(retain_graph=True)
        outputs[:, 1].square().sum().backward()
        outputs = other(inputs)
        (outputs[:, 0].sum() + outputs[:, 1].square().sum()).backward()
        for a, b in zip(gradients(model), gradients(other), strict=True):
            torch.testing.assert_close(a, b)
        return gradients(model)

    first, second = run_ranks(body, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_backward_beside_the_wrapper_stays_local() -> None:
    def body(comm: Communicator) -> Tensor:
        model = wrapped(comm)
        backward(model, comm.rank)
        outputs = model(batch(comm.rank)[0])
        torch.autograd.grad(outputs.sum(), model.module[0].weight, retain_graph=True)  # accumulates nothing
        outputs.sum().backward()
        if comm.rank == 1:
            model.zero_grad()
            backward(model.module, comm.rank)
        return model.module[0].weight.grad

    first, second = run_ranks(body, 2)
    assert not torch.equal(first, second)


def test_what_is_reduced_belongs_to_one_backward_of_one_model() -> None:
    """Buckets of equal size must not meet by chance."""

    def skips_one(comm: Communicator) -> None:
        model = wrapped(comm)
        for step in range(4):
            loss = F.cross_entropy(model(batch(comm.rank, 8, step)[0]), batch(comm.rank, 8, step)[1])
            if comm.rank == 1 and step == 1:
                continue
            loss.backward()
        model.check_desync()

    def in_another_order(comm: Communicator) -> None:
        first, second = wrapped(comm), wrapped(comm)
        one, two = (first, second) if comm.rank else (second, first)
        inputs = batch(comm.rank)[0]
        two(one(inputs)[:, :1].expand(8, 30)).sum().backward()

    def shares_in_another_order(comm: Communicator) -> None:
        layer = nn.Linear(30, 30, bias=False)
        first, second = wrapped(comm, layer), wrapped(comm, layer)
        for model in (first, second):
            ShardedOptimizer(model, torch.optim.SGD, lr=1.0)
        for model in (first, second) if comm.rank else (second, first):
            model(batch(comm.rank)[0]).sum().backward()

    def rows_in_another_order(comm: Communicator) -> None:
        model = wrapped(comm, nn.ModuleList([nn.Embedding(9, 3, sparse=True) for _ in range(2)]), bucket_cap_mb=1e-6)
        model.module.forward = lambda x: sum(layer(x) for layer in model.module)
        for step in range(2):
            if not (comm.rank and step):
                model(torch.tensor([1])).sum().backward()
        model.check_desync()

    for body in (skips_one, shares_in_another_order, rows_in_another_order, in_another_order):
        failures = run_ranks(body, 2, return_exceptions=True)
        assert all(isinstance(failure, CollectiveMismatch) for failure in failures), failures
    assert "bucket 0 of backward 1 of model 2" in str(failures[0])


def test_a_forward_that_is_not_synchronised_leaves_nothing_armed() -> None:
    def body(comm: Communicator) -> Tensor:
        model = wrapped(comm, reduce_op="sum")
        model(batch(comm.rank)[0])  # only looked at
        for step in range(2):
            with model.no_sync():
                backward(model, comm.rank, 8, step)
        return model.module[0].weight.grad

    first, second = run_ranks(body, 2)
    assert not torch.equal(first, second)


def test_join_refuses_what_a_rank_without_inputs_cannot_do() -> None:
    def body(comm: Communicator) -> None:
        model = wrapped(comm, find_unused_parameters=True, skip_all_reduce_unused_params=True)
        with pytest.raises(RuntimeError, match=r"join\(\) does not go with"), model.join():
            pass

    run_ranks(body, 1)


def test_copies_reduce_as_the_wrapper_does(tmp_path: Path) -> None:
    def body(comm: Communicator) -> list[Tensor]:
        model = wrapped(comm, find_unused_parameters=True).eval()
        backward(model, comm.rank)
        again = copy.deepcopy(model)
        assert not again.training
        again.zero_grad()
        for _ in range(2):
            again.zero_grad()
            backward(again, comm.rank)
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(again), strict=True))
        assert again.module is not model.module
        return gradients(again)

    first, second = run_ranks(body, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = ringred.DistributedDataParallel(copy.deepcopy(MODEL))
    torch.save(alone, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    backward(alone, 0)
    backward(loaded, 0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(alone), gradients(loaded), strict=True))
    alone.comm.close()


def test_a_delayed_gradient_that_comes_too_late_is_named() -> None:
    def body(comm: Communicator) -> None:
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model = ringred.DistributedDataParallel(
            module,
            process_group=comm,
            delay_all_reduce_named_params=[("0.weight", module[0].weight)],
            param_to_hook_all_reduce=module[1].weight,
        )
        with pytest.raises(RuntimeError, match=r"delayed parameter '0\.weight' came after"):
            model(torch.ones(1, 4)).sum().backward()

    run_ranks(body, 2)


def test_use_that_differs_between_ranks_is_no_mixture_where_unused_are_skipped() -> None:
    def body(comm: Communicator) -> None:
        model = wrapped(
            comm,
            nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)]),
            find_unused_parameters=True,
            skip_all_reduce_unused_params=True,
            bucket_cap_mb=1e-6,
        )
        model.module.forward = lambda x: model.module[comm.rank](x)
        model(torch.ones(1, 4)).sum().backward()

    failures = run_ranks(body, 2, return_exceptions=True)
    assert all(isinstance(failure, CollectiveMismatch) for failure in failures), failures


def test_gradients_that_come_when_backward_seemed_over_are_named() -> None:
    class Hidden:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Hidden:
            x = checkpoint(self.b, self.a(x), use_reentrant=True)
            return Hidden(checkpoint(self.c, x, use_reentrant=True))

    def body(comm: Communicator) -> None:
        for options in ({"find_unused_parameters": True}, {"static_graph": True}):
            model = wrapped(comm, Model(), **options)
            with pytest.raises(RuntimeError, match=r"the gradient of 'b\..*' came when backward seemed to be over"):
                model(torch.ones(1, 4)).y.sum().backward()

    run_ranks(body, 2)
