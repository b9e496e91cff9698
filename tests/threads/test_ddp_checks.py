"""What DDP compares: plans and settings between ranks, replicas that drift, gradients that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator
from ringred.errors import ModelMismatch, NonFiniteGradient, ReplicasDiverged
from ringred.testing import run_ranks
from tests.threads.wrapping import MODEL, backward, batch, gradients, wrapped


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


@pytest.mark.parametrize("transport", ["local", "shm", "cuda_ipc:fake"])
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


@pytest.mark.parametrize("transport", ["local", "shm", "cuda_ipc:fake"])
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
        from ringred.data_parallel.replicas import check_same_values

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
