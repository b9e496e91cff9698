"""Sums and weighted means: batches of any size count for what they hold."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch
from ringred.testing import run_ranks
from tests.threads.wrapping import MODEL, backward, batch, gradients, wrapped


def test_sum_adds_and_says_so_where_it_would_add_twice() -> None:
    def body(comm: Communicator) -> list[str]:
        model, mean = wrapped(comm, reduce_op="sum"), wrapped(comm)
        for each in (model, mean):
            with each.no_sync():
                backward(each, comm.rank, 8, 1)
            backward(each, comm.rank)
        for a, b in zip(gradients(model), gradients(mean), strict=True):
            torch.testing.assert_close(a, comm.size * b)
        texts = []

        def refused(go_on: Callable[[], object]) -> None:
            with pytest.raises(RuntimeError) as raised:
                go_on()
            texts.append(str(raised.value))
            model.zero_grad()
            backward(model, comm.rank)

        refused(lambda: backward(model, comm.rank))
        loss = F.cross_entropy(model(batch(comm.rank)[0]), batch(comm.rank)[1])
        model.zero_grad(set_to_none=False)  # behind forward is early enough
        loss.backward(retain_graph=True)
        model.zero_grad()
        refused(loss.backward)
        return texts

    for still, second in run_ranks(body, 3):
        assert "still holds the sum of an earlier reduction" in still
        assert "a second backward of one forward cannot be reduced with reduce_op='sum'" in second


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("change", ["clip", "create_graph"])
def test_sums_are_found_though_they_were_changed(change: str) -> None:
    def body(comm: Communicator) -> None:
        model = wrapped(comm, reduce_op="sum")
        inputs = batch(comm.rank)[0]
        model(inputs).square().sum().backward(create_graph=change == "create_graph")
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with pytest.raises(RuntimeError, match="still holds the sum"):
            model(inputs).square().sum().backward(create_graph=change == "create_graph")
        for parameter in model.parameters():
            parameter.grad = None  # create_graph makes a circle

    run_ranks(body, 2)


@pytest.mark.parametrize("as_views", [False, True])
def test_weights_make_the_mean_over_uneven_batches_exact(as_views: bool) -> None:
    counts = [5, 0, 12, 1]
    alone = copy.deepcopy(MODEL).double()
    parts = [batch(rank, count) for rank, count in enumerate(counts)]
    F.cross_entropy(alone(torch.cat([x for x, _ in parts]).double()), torch.cat([y for _, y in parts])).backward()

    def body(comm: Communicator) -> list[Tensor]:
        model = wrapped(comm, copy.deepcopy(MODEL).double(), gradient_as_bucket_view=as_views)
        inputs, targets = parts[comm.rank]
        for _ in range(3):
            model.zero_grad()
            model.weigh(len(inputs))
            outputs = model(inputs.double())
            loss = F.cross_entropy(outputs, targets) if len(inputs) else outputs.sum() * 0
            loss.backward()
        weighed = gradients(model)
        model.zero_grad()
        model(torch.full((1, 30), float(comm.rank), dtype=torch.float64)).sum().backward()  # and without again
        assert torch.allclose(model.module[-1].bias.grad, torch.ones(4, dtype=torch.float64))
        return weighed

    results = run_ranks(body, 4)
    for result in results:
        for got, wanted, first in zip(result, gradients(alone), results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
            assert torch.equal(got, first)


def test_weights_that_make_no_sense() -> None:
    def body(comm: Communicator) -> None:
        model = wrapped(comm)
        for samples in (-1, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="expected a number of samples ≥ 0"):
                model.weigh(samples)
        model.weigh(0)
        with pytest.raises(ValueError, match="all ranks together have no samples"):
            backward(model, comm.rank)
        with pytest.raises(ValueError, match="goes with reduce_op='avg'"):
            wrapped(comm, reduce_op="sum").weigh(1)
        with model.join(), pytest.raises(ValueError, match="outside of join"):
            model.weigh(1)
        model.weigh(1)
        with pytest.raises(ValueError, match="once before each synchronised forward"):
            model.weigh(1)
        model = wrapped(comm)
        with model.no_sync(), pytest.raises(ValueError, match=r"not within no_sync\(\)"):
            model.weigh(1)
        synchronised = wrapped(comm, nn.Sequential(ringred.SyncBatchNorm(30, process_group=comm)))
        with pytest.raises(ValueError, match="does not go with SyncBatchNorm"):
            synchronised.weigh(1)
        with pytest.raises(RuntimeError, match="does not go with SyncBatchNorm"), synchronised.join():
            pass

    run_ranks(body, 2)


def test_a_rank_that_gives_no_weight_is_an_error_on_all() -> None:
    def body(comm: Communicator) -> None:
        model = wrapped(comm)
        if comm.rank:
            model.weigh(3)
        backward(model, comm.rank)

    failures = run_ranks(body, 3, return_exceptions=True)
    assert all(isinstance(failure, CollectiveMismatch) for failure in failures), failures


def test_weights_belong_to_their_forward() -> None:
    def body(comm: Communicator) -> list[float]:
        model = wrapped(comm, nn.Linear(1, 1, bias=False))
        ones, counts, found = torch.full((1, 1), float(comm.rank + 1)), [1, 3][comm.rank], []

        def gradient() -> float:
            value = float(model.module.weight.grad)
            model.zero_grad()
            return value

        model.weigh(counts)
        outputs = model(ones)
        model(ones)
        outputs.sum().backward()
        found.append(gradient())
        model.weigh(counts)
        first = model(ones)
        second = model(ones)
        first.sum().backward()
        found.append(gradient())
        second.sum().backward()
        found.append(gradient())
        model.weigh(counts)
        first = model(ones)
        model.weigh(1)
        with pytest.raises(RuntimeError, match="two forwards of different weights"):
            (first + model(ones)).sum().backward()
        return found

    assert run_ranks(body, 2) == [[1.75, 1.75, 1.5]] * 2


def test_no_samples_count_for_nothing_whatever_their_gradient() -> None:
    def body(comm: Communicator) -> bool:
        model = wrapped(comm)
        model.weigh(8 if comm.rank else 0)
        loss = backward(model, comm.rank) if comm.rank else (model(batch(0)[0]).sum() * float("nan"))
        if not comm.rank:
            loss.backward()
        return all(bool(torch.isfinite(g).all()) for g in gradients(model))

    assert all(run_ranks(body, 2))


def test_join_adds_where_sums_are_asked_for() -> None:
    def body(comm: Communicator) -> list[float]:
        model = wrapped(comm, nn.Linear(1, 1, bias=False), reduce_op="sum")
        found = []
        with model.join(divide_by_initial_world_size=False):
            for _ in range(1 + comm.rank):
                model.zero_grad()
                model(torch.ones(1, 1)).sum().backward()
                found.append(float(model.module.weight.grad))
        return found

    assert run_ranks(body, 2) == [[2.0], [2.0, 1.0]]
