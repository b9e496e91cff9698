"""How things are measured: in turns, so that what disturbs the machine disturbs all alike, and with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ringred.communicator import Communicator

__all__ = ["Progress", "Spread", "interleaved", "slowest", "timed"]

Progress = Callable[[], object]
"""Called after each round."""


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """That of `samples`, one at least."""
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(
    measures: Mapping[str, Callable[[], float]], rounds: int, progress: Progress = lambda: None
) -> dict[str, list[float]]:
    """Calls every measure once a round, `rounds` times."""
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            samples[name].append(measure())
        progress()
    return samples


def timed(comm: Communicator, step: Callable[[], None]) -> Callable[[], float]:
    """Returns a function that times one `step` in seconds; all ranks begin it together."""

    def measure() -> float:
        comm.barrier()
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    return measure


def slowest(comm: Communicator, samples: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """The spread of the times of the slowest rank in each round. Collective."""
    table = torch.tensor([list(of) for of in samples.values()], dtype=torch.float64)
    comm.all_reduce(table, "max", algorithm="one_shot")
    return {name: Spread.of(row) for name, row in zip(samples, table.tolist(), strict=True)}
