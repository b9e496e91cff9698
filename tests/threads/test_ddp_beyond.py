"""What DistributedDataParallel does beyond torch's: sums and weights, plans, one order of addition, checks, reports."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ringred
from ringred.buckets import Entry
from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch, ModelMismatch, NonFiniteGradient, ReplicasDiverged, UnknownAlgorithm
from ringred.optim import ShardedOptimizer
from ringred.overlap import BackwardTimes, forecast, report
from ringred.reports import write_scalars
from ringred.testing import run_ranks

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 4))


def wrapped(comm: Communicator, module: nn.Module = MODEL, **options: Any) -> ringred.DistributedDataParallel:
    return ringred.DistributedDataParallel(copy.deepcopy(module), process_group=comm, **options)


def batch(rank: int, count: int = 8, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(count, 30, generator=generator), torch.randint(4, (count,), generator=generator)


def backward(model: nn.Module, *at: int) -> Tensor:
    inputs, targets = batch(*at)
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()
    return loss


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ---------------------------------------------------------------------- sums and weights


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


# ---------------------------------------------------------------------- several backwards


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


def test_what_is_asked_of_single_parameters_is_compared() -> None:
    def body(comm: Communicator) -> str:
        with pytest.raises(ModelMismatch) as raised:
            wrapped(comm, nn.Embedding(5, 3, sparse=comm.rank == 1))
        return str(raised.value)

    assert all("rank 1 has parameter 'weight': sparse True" in text for text in run_ranks(body, 2))


def test_a_module_that_was_converted_is_named() -> None:
    def body(comm: Communicator) -> None:
        for as_views in (False, True):
            model = wrapped(comm, gradient_as_bucket_view=as_views)
            model.double()
            with pytest.raises(
                ringred.UnsupportedTensor, match=r"expected a gradient of torch\.float32, got torch\.float64"
            ):
                model(torch.ones(1, 30, dtype=torch.float64)).sum().backward()

    run_ranks(body, 1)


# ---------------------------------------------------------------------- plans


def test_a_saved_plan_lays_out_the_first_iteration_as_the_last(tmp_path: Path) -> None:
    class Backwards(nn.Module):
        """Declared in the order in which it is not used."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(50, 4), nn.Linear(30, 50)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    module = Backwards()

    def body(comm: Communicator) -> tuple[list[list[str]], ...]:
        model = wrapped(comm, module, bucket_cap_mb=0.001)
        before = model.bucket_plan()
        for step in range(2):
            backward(model, comm.rank, 8, step)
        after = model.bucket_plan()
        path = tmp_path / f"plan{comm.rank}.json"
        model.save_bucket_plan(path)
        for plan in (after, path):
            again = wrapped(comm, module, bucket_cap_mb=0.001, bucket_plan=plan)
            assert again.bucket_plan() == after
            for step in range(2):
                backward(again, comm.rank, 8, step)
            assert again.bucket_plan() == after
            assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(again), strict=True))
        return before, after

    results = run_ranks(body, 2)
    assert results[0] == results[1]
    before, after = results[0]
    assert before[0][0].startswith("first")
    assert after[0][0].startswith("last")
    assert {path.name for path in tmp_path.iterdir()} == {"plan0.json", "plan1.json"}, "nothing half-written"


def test_plans_and_settings_that_differ_are_told_on_all_ranks() -> None:
    plan = [[name] for name, _ in MODEL.named_parameters()]

    def body(comm: Communicator) -> list[str]:
        texts = []
        for options in ({"bucket_plan": plan if comm.rank else plan[::-1]}, {"find_unused_parameters": comm.rank == 1}):
            with pytest.raises(ModelMismatch) as raised:
                wrapped(comm, **options)
            texts.append(str(raised.value))
        return texts

    for plans, settings in run_ranks(body, 2):
        assert "bucket plan [['4.bias'" in plans
        assert "rank 1 has find_unused=True" in settings


# ---------------------------------------------------------------------- one order of addition


CAPS = (1e-6, 0.004, 25)


def test_the_caps_make_other_buckets() -> None:
    plans = run_ranks(lambda comm: [len(wrapped(comm, bucket_cap_mb=cap).bucket_plan()) for cap in CAPS], 1)
    assert plans == [[6, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_deterministic_bits_depend_on_neither_buckets_nor_algorithm_nor_transport(
    size: int, dtype: torch.dtype
) -> None:
    module = copy.deepcopy(MODEL).to(dtype)

    def body(comm: Communicator) -> list[list[Tensor]]:
        found = []
        for options in (
            *({"bucket_cap_mb": cap} for cap in CAPS),
            *({"algorithm": algorithm, "bucket_cap_mb": 0.004} for algorithm in ("direct", "one_shot", "central")),
            {"gradient_as_bucket_view": True},
        ):
            model = wrapped(comm, module, deterministic=True, **options)
            for step in range(2):
                model.zero_grad()
                generator = torch.Generator().manual_seed(100 * comm.rank + step)
                model(torch.randn(16, 30, generator=generator, dtype=dtype)).float().logsumexp(1).sum().backward()
            found.append(gradients(model))
        return found

    runs = [run_ranks(body, size, transport) for transport in ("local", "shm", "torch_p2p")]
    first = runs[0][0][0]
    assert any(g.any() for g in first)
    for run in runs:
        for rank in run:
            for got in rank:
                assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


def test_the_ring_adds_in_another_order_and_is_refused() -> None:
    """The test above could not fail if rounding did not show at all."""

    def body(comm: Communicator) -> bool:
        with pytest.raises(
            UnknownAlgorithm, match="adds an element in an order that depends on where the element lies"
        ):
            wrapped(comm, deterministic=True, algorithm="ring")
        found = []
        for cap in (CAPS[0], CAPS[2]):
            model = wrapped(comm, algorithm="ring", bucket_cap_mb=cap)
            backward(model, comm.rank)
            found.append(gradients(model))
        return all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    assert not any(run_ranks(body, 5))


# ---------------------------------------------------------------------- checks


@pytest.mark.parametrize("transport", ["local", "shm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named_and_goes_to_nobody(bad: float, transport: str) -> None:
    def body(comm: Communicator) -> str:
        model = wrapped(comm, check_finite=True, bucket_cap_mb=0.004)
        backward(model, comm.rank)
        model.zero_grad()
        if comm.rank == 2:
            model.module[2].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), bad))
        inputs, targets = batch(comm.rank)
        loss = F.cross_entropy(model(inputs), targets)
        with pytest.raises(NonFiniteGradient) as raised:
            loss.backward()
        assert isinstance(raised.value, ArithmeticError)
        assert not gradients(model), "nobody steps by what is left"
        model.module[2].weight._backward_hooks = None
        model.zero_grad()
        backward(model, comm.rank)  # the next step is as good as any
        assert all(bool(torch.isfinite(g).all()) for g in gradients(model))
        return str(raised.value)

    for rank, text in enumerate(run_ranks(body, 3, transport)):
        found = "50 NaN, 0 infinite" if bad != bad else "0 NaN, 50 infinite"
        assert text.startswith(f"rank {rank}: expected finite gradients")
        assert f"that of '2.weight' on rank 2 ({found})" in text
        assert "rank 0 (" not in text
        assert "rank 1 (" not in text


def test_great_gradients_are_finite() -> None:
    def body(comm: Communicator) -> bool:
        model = wrapped(comm, nn.Linear(2, 2).half(), check_finite=True)
        model(torch.full((1, 2), 6e4, dtype=torch.float16)).sum().backward()
        return bool(torch.isfinite(model.module.weight.grad).all())

    assert all(run_ranks(body, 2))


def test_a_parameter_that_drifted_is_named_with_the_ranks() -> None:
    def body(comm: Communicator) -> tuple[int, str]:
        model = wrapped(comm, desync_check_every=3)
        for step in range(10):
            if step == 4 and comm.rank == 1:
                with torch.no_grad():
                    model.module[2].weight.view(-1)[7] += 1e-6
                    model.module[4].bias += 1
            model.zero_grad()
            try:
                backward(model, comm.rank, 8, step)
            except ReplicasDiverged as failure:
                return step, str(failure)
        return -1, ""

    for rank, (step, text) in enumerate(run_ranks(body, 3)):
        assert step == 5, "every third forward"
        assert text.startswith(f"rank {rank}: ")
        assert "'2.weight' is the first of 2 that differ: rank 1 from ranks 0, 2" in text


@pytest.mark.parametrize("transport", ["local", "shm"])
def test_a_parameter_that_one_rank_does_not_use_is_named_on_all(transport: str) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(30, 4), nn.Linear(30, 4)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            return self.left(x) + (self.right(x) if both else 0)

    def body(comm: Communicator) -> None:
        model = wrapped(comm, Branches())
        for _ in range(3):
            model(batch(comm.rank)[0], both=comm.rank != 1).sum().backward()

    for rank, failure in enumerate(run_ranks(body, 3, transport, return_exceptions=True)):
        assert isinstance(failure, RuntimeError)
        assert str(failure).startswith(f"rank {rank}: ")
        assert "rank 1: expected to have finished reduction" in str(failure)
        assert "no gradient came for right.weight, right.bias" in str(failure)


def test_a_checksum_sees_what_changed_places_and_every_dtype() -> None:
    def body(comm: Communicator) -> None:
        tensors = [torch.arange(5000.0), torch.arange(7, dtype=torch.int8), torch.tensor(1 + 2j), torch.zeros(0)]
        tensors.append(torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16().permute(2, 0, 1))
        from ringred.replicas import check_same_values

        names = list(map(str, range(len(tensors))))
        check_same_values(comm, names, tensors)
        tensors.append(torch.randn(4, 1024, generator=torch.Generator().manual_seed(1)))
        names = list(map(str, range(len(tensors))))
        for at in (0, 1, 4, 5):
            changed = [t.clone() for t in tensors]
            if comm.rank == 0:
                rows = changed[at] if at == 5 else changed[at].reshape(-1)  # whole rows, as long as the checksum's
                rows[[1, 2]] = rows[[2, 1]]
                changed[at] = rows
            with pytest.raises(ReplicasDiverged, match=f"'{at}' is the first of 1 that differ"):
                check_same_values(comm, names, changed)

    run_ranks(body, 2)


# ---------------------------------------------------------------------- reports


def test_the_straggler_is_named_on_every_rank() -> None:
    class Slow(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.inner, self.norm, self.seconds = copy.deepcopy(MODEL), nn.BatchNorm1d(30), seconds

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(self.seconds)
            return self.inner(self.norm(x))

    def body(comm: Communicator) -> tuple[dict[str, Any], str]:
        late = comm.size - 1
        # BatchNorm's buffers come from rank 0 in each forward, and wait there too.
        model = wrapped(comm, Slow(0.02 if comm.rank == late else 0.0))
        for step in range(6):
            backward(model, comm.rank, 8, step)
        report = model.straggler_report()
        return report.as_dict(), str(report)

    results = run_ranks(body, 3)
    assert len({json.dumps(report) for report, _ in results}) == 1, "all ranks say the same"
    report, text = results[0]
    assert report["straggler"] == 2
    assert report["iterations"] == 5
    assert report["ranks"][2]["caused"] > 0.8
    assert report["ranks"][2]["waits_ms"] < 5 < 10 < report["ranks"][0]["waits_ms"]
    assert report["waiting"] > 0.3
    assert "rank 2 is the straggler" in text


def test_rank_0_is_named_though_the_others_wait_for_it_in_forward() -> None:
    def body(comm: Communicator) -> int | None:
        model = wrapped(comm, nn.Sequential(nn.BatchNorm1d(30), MODEL))
        for step in range(6):
            if comm.rank == 0:
                time.sleep(0.02)  # before forward, in which the others wait for its buffers
            backward(model, comm.rank, 8, step)
        return model.straggler_report().straggler

    assert run_ranks(body, 3) == [0, 0, 0]


def test_a_straggler_report_does_not_mix_iterations_of_join() -> None:
    def body(comm: Communicator) -> int:
        model = wrapped(comm)
        with model.join():
            for step in range(2 + comm.rank):
                backward(model, comm.rank, 8, step)
        for step in range(3):
            backward(model, comm.rank, 8, step)
        return model.straggler_report().iterations

    assert run_ranks(body, 2) == [2, 2]


def test_a_straggler_report_of_nothing() -> None:
    def body(comm: Communicator) -> str:
        report = wrapped(comm).straggler_report()
        assert report.straggler is None
        return str(report)

    assert all("nothing is known of stragglers" in text for text in run_ranks(body, 2))


def test_the_forecast_is_what_a_simulation_by_hand_gives() -> None:
    ms = 1_000_000
    times = BackwardTimes(
        began_ns=0,
        ended_ns=10 * ms,
        ready_ns=[10 * ms, 6 * ms, 2 * ms, 0],  # the last one is delayed
        full_ns=[2 * ms, 10 * ms],
        started_ns=[2 * ms, 10 * ms],
        done_ns=[4 * ms, 14 * ms],
        nbytes=[1 << 20, 2 << 20],
        parameters=[1, 2],
        algorithms=["direct", "direct"],
    )
    entries = [Entry(1 << 20, "f")] * 4
    caps, slowness = forecast(times, entries, set(), lambda nbytes: nbytes / (1 << 20) / 1000)
    assert slowness == pytest.approx(2.0)  # 6 ms where the model says 3
    exposed = {cap.cap_mb: (cap.buckets, cap.exposed_ms) for cap in caps}
    assert exposed[1] == (3, pytest.approx(2.0))  # each 2 ms, of which the last begins at the end
    assert exposed[2] == (2, pytest.approx(2.0))
    assert exposed[5] == (1, pytest.approx(6.0))
    found = report(times, caps, slowness)
    assert found.exposed_ms == pytest.approx(4.0)
    assert found.best_cap == caps[0]
    assert "bucket_cap_mb=1 (3 buckets) is expected to leave 2.00 ms after backward" in str(found)
    late = forecast(times, entries, set(), lambda nbytes: 1e-4)
    assert late == ([], pytest.approx(30.0))
    assert "reductions took 30 times what the cost model says: they waited" in str(report(times, *late))
    times.done_ns = [4 * ms, 10 * ms + 1]
    assert str(report(times, caps, slowness)).endswith("100% hidden")


def test_reports_as_json_and_scalars(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def body(comm: Communicator) -> None:
        model = wrapped(comm, bucket_cap_mb=0.004)
        for step in range(4):
            backward(model, comm.rank, 8, step)
        overlap, stragglers = model.overlap_report(), model.straggler_report()
        assert json.loads(json.dumps(overlap.as_dict()))["hidden"] == overlap.hidden
        assert len(overlap.buckets) == len(model.bucket_plan())
        assert overlap.slowness > 0
        assert f"{overlap.hidden:.0%} hidden" in str(overlap)
        if comm.rank == 0:
            with tensorboard.SummaryWriter(str(tmp_path)) as writer:
                write_scalars(writer, 4, overlap, stragglers)

    run_ranks(body, 2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"overlap/exposed_ms", "overlap/hidden", "straggler/waiting", "straggler/rank1/caused"} <= set(tags)
    assert [event.step for event in events.Scalars("overlap/hidden")] == [4]


# ---------------------------------------------------------------------- torch.compile


def test_compiled_graphs_are_cut_where_buckets_end() -> None:
    """Else all gradients would come at the end of backward, and nothing would overlap."""

    class Layers(nn.Module):
        """The compiler leaves the frames of torch's own containers alone."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(600, 600) for _ in range(4)])  # of 1.4 MB each

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def graphs_of(compiles: Callable[[nn.Module, Any], nn.Module]) -> int:
        torch.compiler.reset()
        graphs = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        model = ringred.DistributedDataParallel(Layers(), bucket_cap_mb=1)
        runs = compiles(model, backend)
        for _ in range(2):
            runs(torch.ones(2, 600)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.comm.close()
        return len(graphs)

    def whole(model: nn.Module, backend: Any) -> nn.Module:
        return torch.compile(model, backend=backend)

    def within(model: nn.Module, backend: Any) -> nn.Module:
        model.module = torch.compile(model.module, backend=backend)
        return model

    assert graphs_of(whole) == 4
    assert graphs_of(within) == 4
