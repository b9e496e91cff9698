"""What each rank of the laboratory's step experiment does: trains a replayed model, way by way.

A replayed layer sleeps until its backward is over and hands over a gradient of its true size. Rank 0 prints one JSON
line a measured case: the median step of the slowest rank, the bytes of the busiest, and how late a layer was.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

import ringred
from lab.costs import calibrate
from lab.profiles import Profile, profile


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, clock: _Clock, until: float) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.clock, ctx.until = clock, until
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        made = torch.full_like(weight, 1e-3)  # memory that is written, as by real arithmetic
        ctx.clock.sleep_until(ctx.until)
        return gradients[0], made, None, None


class _Clock:
    """Times since the step began; `late` is how long a layer came after its time."""

    def __init__(self) -> None:
        self.began, self.late = time.perf_counter(), 0.0

    def start(self) -> None:
        self.began, self.late = time.perf_counter(), 0.0

    def sleep_until(self, seconds: float) -> None:
        left = self.began + seconds - time.perf_counter()
        self.late = max(self.late, -left)
        if left > 0:
            time.sleep(left)


class Replayed(nn.Module):
    """A model of a profile whose times are `dilation` times as long; a straggler's are longer by a factor."""

    def __init__(self, model: Profile, dilation: float) -> None:
        super().__init__()
        self.clock = _Clock()
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(layer.elements)) for layer in model.layers])
        self.forward_seconds = model.forward * dilation
        ends, now = [], self.forward_seconds
        for seconds in reversed(model.backward):
            now += seconds * dilation
            ends.append(now)
        self.ends = ends[::-1]

    def forward(self, x: Tensor) -> Any:
        self.clock.start()
        self.clock.sleep_until(self.forward_seconds)
        layer: Any = _Layer.apply
        for weight, until in zip(self.weights, self.ends, strict=True):
            x = layer(x, weight, self.clock, until)
        return x.sum()


def stepper(comm: ringred.Communicator, way: str, module: Replayed) -> tuple[Callable[[], object], Callable[[], int]]:
    """A training step, and the bytes that this rank has sent so far; without an optimizer, whose time is none here."""
    x = torch.ones(1, requires_grad=True)
    if way == "alone":
        model: nn.Module = module
    elif way == "gloo":
        model = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    else:
        model = ringred.DistributedDataParallel(
            module, process_group=comm, algorithm=way, gradient_as_bucket_view=True, init_sync=False
        )

    def step() -> None:
        model(x).backward()
        module.zero_grad()

    return step, lambda: comm.counters.bytes_sent


def measured(comm: ringred.Communicator, way: str, model: Profile, task: dict[str, Any]) -> dict[str, Any]:
    """One case; collective."""
    module = Replayed(model, task["dilation"])
    step, sent = stepper(comm, way, module)
    times, late = [], 0.0
    for turn in range(1 + task["steps"]):
        comm.barrier()
        before = sent()
        began = time.perf_counter()
        step()
        took = torch.tensor([time.perf_counter() - began])
        moved = sent() - before
        comm.all_reduce(took, "max")
        if turn:
            times.append(took.item())
            late = max(late, module.clock.late)
    numbers = torch.tensor([float(moved), late])
    comm.all_reduce(numbers, "max")
    return {"seconds": statistics.median(times), "low": min(times), "high": max(times), "bytes": numbers[0].item()} | {
        "late": numbers[1].item()
    }


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    comm = ringred.init()
    if "gloo" in task["ways"]:
        import torch.distributed as dist

        dist.init_process_group("gloo")
    costs = calibrate(comm)
    if comm.rank == 0:
        print(json.dumps({"costs": costs, "segment": comm.transport.segment_bytes}), flush=True)
    for name in task["models"]:
        for way in task["ways"]:
            found = measured(comm, way, profile(name), task)
            if comm.rank == 0:
                print(json.dumps({"model": name, "way": way, **found}), flush=True)
    with suppress(NameError):
        dist.destroy_process_group()
    comm.close()


if __name__ == "__main__":
    main()
