"""What of the communication backward has hidden: bucket by bucket, from the clock of one iteration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

__all__ = ["BucketTimes", "OverlapReport"]


@dataclass(frozen=True, slots=True)
class BucketTimes:
    """One bucket in milliseconds since backward began: full, its reduction started and ended.

    `exposed_ms` is the part of the reduction that ran after backward had ended: what the step waited for.
    """

    bucket: int
    nbytes: int
    parameters: int
    ready_ms: float
    start_ms: float
    end_ms: float
    exposed_ms: float


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """The last synchronised backward of this rank. `print` it, or take `as_dict()` for JSON."""

    backward_ms: float
    buckets: tuple[BucketTimes, ...]

    @property
    def communication_ms(self) -> float:
        """The time in which at least one reduction ran: they run one after the other."""
        return sum(bucket.end_ms - bucket.start_ms for bucket in self.buckets)

    @property
    def exposed_ms(self) -> float:
        return sum(bucket.exposed_ms for bucket in self.buckets)

    @property
    def hidden(self) -> float:
        """The share of the communication that backward hid, 0 to 1; 1 where there was none."""
        if not self.communication_ms:
            return 1.0
        # Sums of differences: rounding must not make it a hair less than nothing.
        return max(0.0, 1.0 - self.exposed_ms / self.communication_ms)

    def as_dict(self) -> dict[str, Any]:
        return {
            "backward_ms": self.backward_ms,
            "communication_ms": self.communication_ms,
            "exposed_ms": self.exposed_ms,
            "hidden": self.hidden,
            "buckets": [asdict(bucket) for bucket in self.buckets],
        }

    def __str__(self) -> str:
        rows = [
            (b.bucket, b.nbytes, b.parameters, b.ready_ms, b.start_ms, b.end_ms, b.exposed_ms) for b in self.buckets
        ]
        headers = ["bucket", "bytes", "parameters", "ready ms", "start ms", "end ms", "exposed ms"]
        table = tabulate(rows, headers=headers, floatfmt=".2f")
        return (
            f"{table}\nbackward {self.backward_ms:.2f} ms, reductions {self.communication_ms:.2f} ms, "
            f"of which {self.exposed_ms:.2f} ms after backward: {self.hidden:.0%} hidden"
        )
