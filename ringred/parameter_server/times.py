"""How long mini-batches take: the distributions that simulated and live stragglers are drawn from, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Exponential", "Pareto", "Recorded", "ShiftedExponential", "Slowed", "Times"]


class Times(Protocol):
    """A distribution of mini-batch times."""

    def sample(self, generator: np.random.Generator, worker: int, count: int) -> NDArray[np.float64]:
        """The next `count` mini-batch times of `worker`, in seconds."""

    @property
    def mean(self) -> float:
        """The expected time of a mini-batch, in seconds."""


@dataclass(frozen=True)
class Exponential:
    """Without memory: what is left of a mini-batch takes as long as a whole one."""

    mean: float = 1.0

    def sample(self, generator: np.random.Generator, worker: int, count: int) -> NDArray[np.float64]:
        return generator.exponential(self.mean, count)


@dataclass(frozen=True)
class ShiftedExponential:
    """A constant `shift`, in seconds, that every mini-batch takes, and an exponential delay of mean `delay` on top."""

    shift: float
    delay: float

    def sample(self, generator: np.random.Generator, worker: int, count: int) -> NDArray[np.float64]:
        return self.shift + generator.exponential(self.delay, count)

    @property
    def mean(self) -> float:
        return self.shift + self.delay


@dataclass(frozen=True)
class Pareto:
    """Heavy-tailed: at least `least` seconds, and longer than t with probability (least/t)^shape."""

    least: float
    shape: float

    def __post_init__(self) -> None:
        if self.shape <= 1:
            raise ValueError(f"Pareto: expected a shape above 1, which has a mean, got {self.shape}")

    def sample(self, generator: np.random.Generator, worker: int, count: int) -> NDArray[np.float64]:
        return self.least * (1 + generator.pareto(self.shape, count))

    @property
    def mean(self) -> float:
        return self.least * self.shape / (self.shape - 1)


@dataclass(frozen=True)
class Recorded:
    """Draws from `seconds`, mini-batch times that were measured."""

    seconds: Sequence[float]

    def __post_init__(self) -> None:
        if not self.seconds or min(self.seconds) < 0:
            raise ValueError("Recorded: expected at least one time, and none below 0")

    def sample(self, generator: np.random.Generator, worker: int, count: int) -> NDArray[np.float64]:
        return generator.choice(np.asarray(self.seconds, dtype=np.float64), count)

    @property
    def mean(self) -> float:
        return float(np.mean(self.seconds))


@dataclass(frozen=True)
class Slowed:
    """`times`, but `worker` takes `factor` times as long: a straggler."""

    times: Times
    worker: int
    factor: float

    def sample(self, generator: np.random.Generator, worker: int, count: int) -> NDArray[np.float64]:
        return self.times.sample(generator, worker, count) * (self.factor if worker == self.worker else 1.0)

    @property
    def mean(self) -> float:
        return self.times.mean
