"""Forwards and backwards in other orders than one after the other, and those that fail."""

from __future__ import annotations

import gc
import json
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator
from ringred.testing import run_ranks


@dataclass
class Outputs:
    loss: Tensor
    extra: list[Tensor]


def test_outputs_may_be_nested() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Outputs:
            return Outputs(self.a(x).sum(), [self.b(x)])

    def body(comm: Communicator) -> Tensor:
        model = ringred.DistributedDataParallel(Nested(), process_group=comm, find_unused_parameters=True)
        outputs = model(torch.full((1, 2), float(comm.rank)))
        (outputs.loss + outputs.extra[0].sum()).backward()
        return model.module.b.weight.grad

    assert all(torch.equal(gradient, torch.full((1, 2), 0.5)) for gradient in run_ranks(body, 2))


def test_the_trace_shows_reductions_under_backward_and_the_report_says_how_much(tmp_path: Path) -> None:
    def body(comm: Communicator) -> dict[str, object]:
        comm.start_trace(str(tmp_path / "trace.json"))
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(300, 300), nn.ReLU()) for _ in range(6)]
        model = ringred.DistributedDataParallel(nn.Sequential(*layers), process_group=comm, bucket_cap_mb=0.3)
        for _ in range(3):
            # A backward of some ms: ranks are threads, and all their threads share two cores.
            model(torch.randn(512, 300)).sum().backward()
        return model.overlap_report().as_dict()

    reports = run_ranks(body, 2)
    for rank, report in enumerate(reports):
        events = json.loads((tmp_path / f"trace.rank{rank}.json").read_text())["traceEvents"]
        backward = [e for e in events if e["name"] == "backward"]
        first = [e for e in events if e["name"].startswith("bucket 0 (")]
        assert len(backward) == len(first) == 3
        for under, over in zip(first, backward, strict=True):
            assert over["ts"] < under["ts"] < over["ts"] + over["dur"], "bucket 0 starts before backward ends"
        assert {"forward", "wait", "fold"} <= {e.get("cat") for e in events} | {e["name"] for e in events}
        buckets = report["buckets"]
        assert len(buckets) == 6
        assert all(b["ready_ms"] <= b["start_ms"] <= b["end_ms"] for b in buckets)
        assert report["exposed_ms"] == pytest.approx(sum(b["exposed_ms"] for b in buckets))
        assert report["hidden"] == pytest.approx(1 - report["exposed_ms"] / report["communication_ms"])
        # What ran after backward is what is exposed, no more and no less.
        last = buckets[-1]
        assert last["exposed_ms"] == pytest.approx(
            max(0.0, last["end_ms"] - max(report["backward_ms"], last["start_ms"])), abs=1e-6
        )


def test_two_forwards_before_a_backward_and_evaluation_in_between() -> None:
    """Broadcasting buffers must not spoil what autograd has saved."""

    def body(comm: Communicator) -> Tensor:
        torch.manual_seed(0)
        model = ringred.DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), process_group=comm)
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(comm.rank))
        first = model(inputs)
        with torch.no_grad():
            model(inputs)
        (first * model(inputs + 1)).mean().backward()
        # Ranks may evaluate unequal numbers of batches before they train on.
        model.eval()
        with torch.no_grad():
            for _ in range(2 + comm.rank):
                model(inputs)
        model.train()
        model(inputs).mean().backward()
        return model.module[1].weight.grad

    results = run_ranks(body, 2)
    assert torch.equal(*results)


def test_what_was_accumulated_without_synchronisation_is_reduced_though_unused_now() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(())) for _ in range(2))

        def forward(self, x: Tensor, which: str) -> Tensor:
            return getattr(self, which) * x

    def body(comm: Communicator, as_view: bool) -> tuple[float, float]:
        model = ringred.DistributedDataParallel(
            Either(), process_group=comm, find_unused_parameters=True, gradient_as_bucket_view=as_view
        )
        x = torch.tensor(float(comm.rank))
        with model.no_sync():
            model(x, "a").backward()
        model(x, "b").backward()
        model(x, "b").backward()  # without zero_grad: a keeps what it has, b accumulates
        return model.module.a.grad.item(), model.module.b.grad.item()

    for as_view in (False, True):
        assert run_ranks(lambda comm, as_view=as_view: body(comm, as_view), 2) == [(0.5, 1.0)] * 2


def test_an_output_that_the_loss_does_not_use() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [head(x) for head in self.heads]

    def body(comm: Communicator) -> list[Tensor | None]:
        model = ringred.DistributedDataParallel(Heads(), process_group=comm, find_unused_parameters=True)
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(1, 2))[comm.rank].sum().backward()  # each rank has a head of its own, none the third
        return [head.weight.grad for head in model.module.heads]

    for first, second, third in run_ranks(body, 2):
        assert torch.equal(first, torch.full((1, 2), 0.5))
        assert torch.equal(second, torch.full((1, 2), 0.5))
        assert third is None


def test_a_backward_that_failed_is_said_and_training_goes_on() -> None:
    def body(comm: Communicator) -> Tensor:
        torch.manual_seed(0)
        model = ringred.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), process_group=comm)
        output = model(torch.ones(1, 3))
        inner = model.module[0].weight.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output.sum().backward()
        inner.remove()
        with pytest.raises(RuntimeError, match="expected to have finished reduction"):
            model(torch.ones(1, 3))
        for _ in range(3):
            model.zero_grad()
            model(torch.full((1, 3), float(comm.rank))).sum().backward()
        return model.module[0].weight.grad

    results = run_ranks(body, 2)
    assert torch.equal(*results)
    assert results[0].abs().sum() > 0


def test_buffers_that_a_module_replaces_are_synchronised_too() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            return (x * self.weight + self.mean).sum()

    def body(comm: Communicator) -> Tensor:
        model = ringred.DistributedDataParallel(Average(), process_group=comm)
        for _ in range(3):
            model(torch.full((4, 2), float(comm.rank))).backward()
        model(torch.zeros(4, 2))
        return model.module.mean

    first, second = run_ranks(body, 2)
    assert torch.equal(first, second)


def test_a_wrapper_that_is_dropped_takes_its_hooks_along() -> None:
    def body(comm: Communicator) -> tuple[int, bool]:
        model = nn.Linear(4, 4, bias=False)
        wrappers = [weakref.ref(ringred.DistributedDataParallel(model, process_group=comm)) for _ in range(3)]
        gc.collect()
        last = ringred.DistributedDataParallel(model, process_group=comm)
        before = comm.counters.bytes_sent
        last(torch.ones(1, 4)).sum().backward()
        return comm.counters.bytes_sent - before, any(wrapper() is not None for wrapper in wrappers)

    assert run_ranks(body, 2) == [(64, False)] * 2


@pytest.mark.parametrize("as_views", [False, True])
@pytest.mark.parametrize("transport", ["local", "shm", "cuda_ipc:fake"])
def test_reductions_of_a_backward_that_was_given_up_do_not_disturb_the_next(transport: str, as_views: bool) -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:
            raise ArithmeticError("in the middle")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 300, bias=False), nn.Linear(300, 2000, bias=False)
            self.fails = False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(Raises.apply(hidden) if self.fails else hidden)

    def body(comm: Communicator) -> bool:
        module = Model()
        with torch.no_grad():
            module.first.weight.fill_(1.0)
        model = ringred.DistributedDataParallel(
            module, process_group=comm, bucket_cap_mb=1e-6, gradient_as_bucket_view=as_views
        )
        for turn in range(6):
            module.zero_grad()
            module.fails = turn % 3 == 2
            if turn == 3:
                with pytest.raises(RuntimeError, match="expected to have finished reduction"):
                    model(torch.zeros(1, 4))
            loss = model(torch.full((1, 4), float(turn + comm.rank))).sum()
            if module.fails:
                if comm.rank == 1:
                    time.sleep(0.05)  # the others have given up before this rank has begun
                with pytest.raises(ArithmeticError):
                    loss.backward()
                continue
            loss.backward()
            mean = sum(turn + rank for rank in range(comm.size)) / comm.size
            assert torch.equal(module.last.weight.grad, torch.full((2000, 300), 4 * mean)), turn
        return True

    assert all(run_ranks(body, 2, transport))
