"""What a parameter server has done: updates, how stale the gradients were, and what was not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

__all__ = ["Figures", "Report"]


@dataclass
class Figures:
    """What happened so far: gradients that counted, by staleness and by worker, and those that were not used."""

    staleness: Counter[int] = field(default_factory=Counter)
    applied: Counter[int] = field(default_factory=Counter)
    dropped: int = 0
    cancelled: int = 0

    def told(self) -> dict[str, Any]:
        """As JSON."""
        counts = {"staleness": sorted(self.staleness.items()), "applied": sorted(self.applied.items())}
        return {**counts, "dropped": self.dropped, "cancelled": self.cancelled}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Figures:
        """Of what `told` returned."""
        counts = [Counter({int(key): int(count) for key, count in told[name]}) for name in ("staleness", "applied")]
        return cls(counts[0], counts[1], int(told["dropped"]), int(told["cancelled"]))


@dataclass(frozen=True)
class Report:
    """`staleness[a]` gradients were used a updates after their parameters were pulled; `applied[w]` are worker w's.

    `dropped` gradients came too late, `cancelled` mini-batches were told to stop. `rate` is the factor of the last
    update's learning rate, `snapshot` the version of the newest snapshot (-1: none), and `snapshot_failure` says why
    one could not be written.
    """

    policy: str
    updates: int
    workers: tuple[int, ...]
    staleness: dict[int, int]
    applied: dict[int, int]
    dropped: int
    cancelled: int
    rate: float
    snapshot: int = -1
    snapshot_failure: str = ""

    @classmethod
    def of(cls, told: dict[str, Any]) -> Report:
        """From what the coordinator tells."""
        counts = {name: {int(key): count for key, count in told[name]} for name in ("staleness", "applied")}
        return cls(**{**told, **counts, "workers": tuple(told["workers"])})

    @property
    def mean_staleness(self) -> float:
        """Of the gradients that were used; 0 if there are none."""
        total = sum(self.staleness.values())
        return sum(value * count for value, count in self.staleness.items()) / total if total else 0.0

    @property
    def distribution(self) -> list[float]:
        """Of the gradients that were used the part that was 0, 1, 2, ... updates stale."""
        total = sum(self.staleness.values())
        return [self.staleness.get(value, 0) / total for value in range(max(self.staleness, default=-1) + 1)]

    def __str__(self) -> str:
        head = (
            f"{self.policy}: {self.updates} updates of {sum(self.applied.values())} gradients, mean staleness "
            f"{self.mean_staleness:.3f}; {self.dropped} dropped, {self.cancelled} cancelled"
        )
        rows = [(value, self.staleness.get(value, 0), f"{part:.1%}") for value, part in enumerate(self.distribution)]
        return f"{head}\n{tabulate(rows, headers=('staleness', 'gradients', 'part'))}"
