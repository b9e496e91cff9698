"""SyncBatchNorm on several ranks is BatchNorm of the joined batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator
from ringred.testing import run_ranks

torch.manual_seed(0)
SPLITS = {2: [5, 2], 3: [1, 6, 2], 4: [4, 0, 3, 1]}


def make(kind: str) -> nn.Module:
    layers: dict[str, list[nn.Module]] = {
        "images": [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)],
        "vectors": [nn.Linear(2, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), nn.BatchNorm1d(5, momentum=None)],
        "untracked": [nn.Linear(2, 5), nn.BatchNorm1d(5, track_running_stats=False)],
    }
    return nn.Sequential(*layers[kind]).double()


def inputs(kind: str, count: int) -> Tensor:
    shape = (count, 2, 6, 6) if kind == "images" else (count, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 10


@pytest.mark.parametrize("size", SPLITS)
@pytest.mark.parametrize("kind", ["images", "vectors", "untracked"])
def test_equals_the_joined_batch(kind: str, size: int) -> None:
    module, whole = make(kind), inputs(kind, sum(SPLITS[size]))
    parts = whole.split(SPLITS[size])

    def body(comm: Communicator) -> tuple[Tensor, Any, list[Tensor], dict[str, Tensor]]:
        model = ringred.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module), comm)
        assert sum(isinstance(layer, ringred.SyncBatchNorm) for layer in model.modules()) >= 1
        model = ringred.DistributedDataParallel(copy.deepcopy(model), process_group=comm, reduce_op="sum")
        for _ in range(2):
            model.zero_grad()
            mine = parts[comm.rank].clone().requires_grad_()
            outputs = model(mine)
            outputs.pow(3).sum().backward()
        model.eval()
        evaluated = model(whole)
        return evaluated, (outputs, mine.grad), [p.grad for p in model.parameters()], model.module.state_dict()

    results = run_ranks(body, size)
    for _ in range(2):
        module.zero_grad()
        joined = whole.clone().requires_grad_()
        outputs = module(joined)
        outputs.pow(3).sum().backward()
    module.eval()
    assert joined.grad is not None
    for rank, (evaluated, (own, own_gradient), gradients, state) in enumerate(results):
        torch.testing.assert_close(own, outputs.split(SPLITS[size])[rank])
        torch.testing.assert_close(own_gradient, joined.grad.split(SPLITS[size])[rank])
        torch.testing.assert_close(gradients, [p.grad for p in module.parameters()])
        if kind != "untracked":  # which looks at the batch in evaluation too
            torch.testing.assert_close(evaluated, module(whole))
        for name, value in module.state_dict().items():
            torch.testing.assert_close(state[name], value)


def test_half_precision_keeps_its_statistics_in_float32() -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor]:
        layer = ringred.SyncBatchNorm(3, process_group=comm)
        generator = torch.Generator().manual_seed(comm.rank)
        batch = (torch.randn(400, 3, generator=generator) + 50).bfloat16().requires_grad_()
        outputs = layer(batch)
        outputs.float().square().sum().backward()
        assert outputs.dtype == batch.grad.dtype == torch.bfloat16
        return outputs.float().mean(), layer.running_mean

    for mean, running in run_ranks(body, 2):
        assert abs(mean) < 0.1
        torch.testing.assert_close(running, torch.full((3,), 5.0), atol=0.05, rtol=0)


def test_it_refuses_what_has_no_statistics() -> None:
    def body(comm: Communicator) -> None:
        layer = ringred.SyncBatchNorm(3, process_group=comm)
        with pytest.raises(ValueError, match=r"expected \[N, 3, \.\.\.\], got \[4, 2\]"):
            layer(torch.ones(4, 2))
        with pytest.raises(ValueError, match="expected more than 1 value per channel in training, got 1"):
            layer(torch.ones(1 if comm.rank == 0 else 0, 3))
        assert layer.eval()(torch.ones(1, 3)).shape == (1, 3)

    run_ranks(body, 2)


def test_converts_as_layers_are_and_is_saved_and_copied(tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        unbiased = nn.BatchNorm1d(3)
        unbiased.register_parameter("bias", None)
        layer = ringred.SyncBatchNorm.convert_sync_batchnorm(unbiased, comm)
        layer(torch.randn(5, 3)).sum().backward()
        assert layer.weight.grad is not None
        with pytest.raises(ValueError, match="expected initialised layers, got a lazy one"):
            ringred.SyncBatchNorm.convert_sync_batchnorm(nn.LazyBatchNorm1d(), comm)
        copied = copy.deepcopy(layer)
        assert copied.comm is layer.comm
        torch.testing.assert_close(copied(torch.ones(5, 3)), layer(torch.ones(5, 3)))

    run_ranks(body, 2)
    layer = ringred.SyncBatchNorm(3)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    inputs = torch.randn(6, 3)
    torch.testing.assert_close(loaded(inputs), layer(inputs))


def test_evaluation_is_each_ranks_own() -> None:
    """Rank 0 may evaluate alone, by its own batch where no statistics were tracked."""

    def body(comm: Communicator) -> None:
        layer = ringred.SyncBatchNorm(3, track_running_stats=False, process_group=comm).eval()
        if comm.rank == 0:
            inputs = torch.randn(6, 3)
            torch.testing.assert_close(layer(inputs), nn.BatchNorm1d(3)(inputs))

    run_ranks(body, 2)
