"""The steps of gpu_check.py that train, on each rank: `python benchmarks/gpu_ddp.py STEP`, started by it."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from gpu_steps import FAKE, close, here, ranks_on_devices, step_main, synchronize


def model_of(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.LayerNorm(width), torch.nn.Linear(width, 10)]
    return torch.nn.Sequential(*layers).to(here())


def batch_of(width: int, turn: int, rank: int) -> torch.Tensor:
    return torch.randn(16, width, generator=torch.Generator().manual_seed(100 * turn + rank)).to(here())


def ddp() -> dict[str, Any]:
    """Ten steps of both DistributedDataParallels, to the bits of one rank that has all data."""
    import torch.distributed as dist

    import ringred
    from ringred.torch_backend import register

    register()  # where ringred is not installed, torch has not met it
    dist.init_process_group("ringred")
    comm = ranks_on_devices() if FAKE else ringred.init()
    checked = 0
    for width in (33, 1000):
        alone = model_of(width)
        ways: dict[str, torch.nn.Module] = {
            "ringred": ringred.DistributedDataParallel(
                model_of(width), process_group=comm, deterministic=True, bucket_cap_mb=0.5
            ),
            "views": ringred.DistributedDataParallel(
                model_of(width), process_group=comm, deterministic=True, gradient_as_bucket_view=True
            ),
            "torch": torch.nn.parallel.DistributedDataParallel(model_of(width)),
        }
        models = {"alone": alone, **ways}
        optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01) for name, model in models.items()}
        for turn in range(10):
            gradients = []
            for rank in range(comm.size):
                alone.zero_grad()
                alone(batch_of(width, turn, rank)).square().mean().backward()
                gradients.append([p.grad.clone() for p in alone.parameters() if p.grad is not None])
            for parameter, *parts in zip(alone.parameters(), *gradients, strict=True):
                parameter.grad = sum(parts[1:], parts[0]).div_(comm.size)
            for model in ways.values():
                model.zero_grad()
                model(batch_of(width, turn, comm.rank)).square().mean().backward()
            for optimizer in optimizers.values():
                optimizer.step()
        for name, model in ways.items():
            for (what, got), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
                # Two ranks add in one order only; of more, torch's reducer scales before it adds.
                if name != "torch" or comm.size == 2:
                    assert torch.equal(got, wanted), f"{name}: {what} of width {width}: other bits than one rank's"
                close(f"{name} {what}", got.detach().cpu(), wanted.detach().cpu())
                checked += 1
    return {"checked": checked}


def wide_model() -> torch.nn.Module:
    """Six linear layers, of 4096 x 4096 numbers each on a GPU."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(_width(), _width()) for _ in range(6)]).to(here())


def _width() -> int:
    return 256 if FAKE else 4096


def stepped(model: Any, meet: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds of a step of `model`, a wrapped `wide_model`, with and without its reductions, in turn."""
    inputs = torch.randn(64 if FAKE else 4096, _width(), device=here())
    times: dict[str, list[float]] = {"reduced": [], "alone": []}
    for turn in range(24):
        way = ("reduced", "alone")[turn % 2]
        synchronize()
        meet()
        began = time.perf_counter()
        with nullcontext() if way == "reduced" else model.no_sync():
            model(inputs).square().mean().backward()
        synchronize()
        times[way].append(time.perf_counter() - began)
        model.zero_grad()
    return {f"{way}_ms": 1e3 * statistics.median(seconds[2:]) for way, seconds in times.items()}


def overlap() -> dict[str, Any]:
    """Milliseconds of a step with and without its reductions, and how much of them backward hid."""
    import ringred

    comm = ranks_on_devices() if FAKE else ringred.init()
    model = ringred.DistributedDataParallel(wide_model(), process_group=comm)
    found = stepped(model, comm.barrier)
    inputs = torch.randn(64 if FAKE else 4096, _width(), device=here())
    model(inputs).square().mean().backward()
    report = model.overlap_report()
    return {**found, "hidden": report.hidden, "communication_ms": report.communication_ms}


def overlap_by_gloo() -> dict[str, Any]:
    """The same steps of torch's DistributedDataParallel on Gloo, which takes tensors of several ranks on one GPU."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return stepped(torch.nn.parallel.DistributedDataParallel(wide_model()), dist.barrier)


if __name__ == "__main__":
    step_main(sys.argv[1], globals())
