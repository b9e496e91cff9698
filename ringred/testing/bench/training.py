"""A training step alone, under ringred's DistributedDataParallel and under torch's on Gloo."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringred.communicator import Communicator
from ringred.ddp import DistributedDataParallel
from ringred.testing.bench.all_reduce import GLOO
from ringred.testing.bench.measuring import Progress, Spread, interleaved, slowest

__all__ = ["ALONE", "efficiency", "gradient_bytes", "measure", "perceptron", "step_timer"]

ALONE = "one rank alone"
_STEPS = 3  # in one measurement
_CLASSES = 10


def perceptron(width: int, batch: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A perceptron of six layers, whose gradients are large for its arithmetic, and a batch for it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(256, width), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.ReLU()]
    batches = torch.randn(batch, 256), torch.randint(0, _CLASSES, (batch,))
    return nn.Sequential(*layers, nn.Linear(width, _CLASSES)), batches


def gradient_bytes(width: int) -> int:
    """Of `perceptron`."""
    return sum(4 * parameter.numel() for parameter in perceptron(width, 1)[0].parameters())


def measure(
    comm: Communicator, systems: Sequence[str], width: int, batch: int, rounds: int, progress: Progress
) -> list[dict[str, Any]]:
    """A row for one rank alone, and for each system: an algorithm of ringred, "auto", or "gloo" for torch's own DDP on
    Gloo. Collective.

    Weak scaling: each rank has a batch of the same size. The efficiency is the time of one rank, alone on its machine
    and without any communication, over that of a step on all ranks.
    """
    alone = step_timer(*perceptron(width, batch), _STEPS)

    def by_the_first() -> float:
        seconds = alone() if comm.rank == 0 else 0.0
        comm.barrier()
        return seconds

    models: dict[str, nn.Module] = {}
    for name in systems:
        model, inputs = perceptron(width, batch)
        if name == GLOO:
            models[name] = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        else:
            models[name] = DistributedDataParallel(
                model, process_group=comm, gradient_as_bucket_view=True, algorithm=name
            )
    measures = {ALONE: by_the_first} | {name: step_timer(model, inputs, _STEPS) for name, model in models.items()}
    spreads = slowest(comm, interleaved(measures, rounds, progress))
    rows = []
    for name, spread in spreads.items():
        wrapped = models.get(name)
        hidden = None
        if isinstance(wrapped, DistributedDataParallel) and comm.size > 1:
            hidden = wrapped.overlap_report().hidden
        rows.append(
            {
                "ranks": 1 if name == ALONE else comm.size,
                "system": name,
                "seconds": spread.median,
                "low": spread.low,
                "high": spread.high,
                "efficiency": efficiency(spreads[ALONE], spread),
                "hidden": hidden,
            }
        )
    return rows


def efficiency(alone: Spread, spread: Spread) -> float:
    """The part of the time of a step in which one rank alone would have made it."""
    return alone.median / spread.median


def step_timer(model: nn.Module, batch: tuple[Tensor, Tensor], steps: int) -> Callable[[], float]:
    """Returns a function that gives the seconds of a training step, as the mean of `steps`. Warms up with two calls of
    it; both are collective where the model is."""
    inputs, targets = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        return (time.perf_counter() - began) / steps

    run()
    run()
    return run
