"""Gradients of DDP equal those of one process on the joined batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator
from ringred.testing import run_ranks
from tests.threads.ddp_models import MODELS, Branches, built, data, share, train


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_one_process_on_the_joined_batch(kind: str, as_view: bool, size: int) -> None:
    models = [built(kind, seed=rank) for rank in range(size)]

    def body(comm: Communicator) -> list[Tensor]:
        # Every rank starts from another model: rank 0's is what counts.
        model = ringred.DistributedDataParallel(
            models[comm.rank], process_group=comm, bucket_cap_mb=0.005, gradient_as_bucket_view=as_view
        )
        assert len(model.bucket_plan()) >= 2
        return train(model, *share(comm))

    results = run_ranks(body, size)
    reference = train(built(kind), *data())
    for gradients in results:
        for got, wanted in zip(gradients, reference, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    for gradients in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0], strict=True)), "the same bits everywhere"


@pytest.mark.parametrize("algorithm", ["ring", "torus", "tree", "double_tree", "direct"])
def test_any_algorithm_and_transport_gives_the_same_training(algorithm: str) -> None:
    def body(comm: Communicator) -> list[Tensor]:
        model = ringred.DistributedDataParallel(copy.deepcopy(original), process_group=comm, algorithm=algorithm)
        return train(model, *share(comm))

    original = built("cnn")
    reference = train(built("cnn"), *data())
    for got, wanted in zip(run_ranks(body, 3, "torch_p2p")[1], reference, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_buckets_are_rebuilt_in_the_order_in_which_gradients_come() -> None:
    class Backwards(nn.Module):
        """Declared in the order in which it is not used."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    def body(comm: Communicator) -> tuple[list[list[str]], list[list[str]]]:
        model = ringred.DistributedDataParallel(Backwards(), process_group=comm, bucket_cap_mb=1e-4)
        before = model.bucket_plan()
        for _ in range(2):
            model(torch.ones(1, 8)).sum().backward()
        return before, model.bucket_plan()

    (before, after), other = run_ranks(body, 2)
    assert other == (before, after)
    assert before == [["first.bias", "first.weight"], ["middle.bias", "middle.weight"], ["last.bias", "last.weight"]]
    assert [sorted(bucket) for bucket in after] == [sorted(bucket) for bucket in reversed(before)]


def test_no_sync_accumulates_and_the_next_backward_reduces_the_sum() -> None:
    def body(comm: Communicator) -> list[Tensor]:
        torch.manual_seed(0)
        model = ringred.DistributedDataParallel(nn.Linear(3, 2).double(), process_group=comm)
        for turn in range(3):
            inputs = torch.full((1, 3), float(10 * turn + comm.rank), dtype=torch.float64)
            if turn < 2:
                with model.no_sync():
                    model(inputs).sum().backward()
            else:
                model(inputs).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    first, second = run_ranks(body, 2)
    for weight, bias in (first, second):
        assert torch.equal(weight, torch.full((2, 3), 30 + 3 * 0.5, dtype=torch.float64))
        assert torch.equal(bias, torch.full((2,), 3.0, dtype=torch.float64))


def test_unused_parameters_are_found_and_keep_their_gradients() -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(0)
        model = ringred.DistributedDataParallel(Branches(), process_group=comm, find_unused_parameters=True)
        for _ in range(2):
            model.zero_grad()
            # Only rank 1 uses the right branch: the others get the mean all the same.
            model(torch.ones(1, 4), both=comm.rank == 1)["out"].sum().backward()
        return model.module.right.weight.grad, model.module.never.weight.grad

    for right, never in run_ranks(body, 3):
        assert torch.allclose(right, torch.full((2, 4), 1 / 3))
        assert never is None


def test_buffers_of_rank_0_are_everybodys() -> None:
    def body(comm: Communicator) -> list[Tensor]:
        torch.manual_seed(comm.rank)
        model = ringred.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), process_group=comm)
        for _ in range(3):
            model(torch.randn(8, 4) + comm.rank).sum().backward()
        model.eval()
        model(torch.zeros(1, 4))
        return [buffer.clone() for buffer in model.buffers()]

    results = run_ranks(body, 3)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    assert results[0][2].item() == 3, "batches tracked"
