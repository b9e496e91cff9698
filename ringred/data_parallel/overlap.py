"""How much of the communication was hidden behind backward, bucket by bucket in one iteration, and how much other
bucket caps would hide."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from ringred.buckets import MIB, Entry, assign
from ringred.data_parallel.reductions import SPARSE_ROWS
from ringred.runtime.trace import Tracer

__all__ = ["BackwardTimes", "BucketTimes", "CapForecast", "OverlapReport", "forecast", "report", "trace"]

_CAPS_MB = (1, 2, 5, 10, 25, 50, 100)  # the caps for which a forecast is made
_LITTLE = 0.05  # fraction of backward: the report gives no advice on an exposed time up to it
SLOW = 4.0  # reductions that take at least this many times the cost model's time are assumed to have waited


@dataclass(slots=True)
class BackwardTimes:
    """The times of one backward, in ns of `time.monotonic_ns`: `ready_ns` has one value for each
    parameter, by place (0 for delayed ones). The other sequences have one value for each bucket, in order: times,
    bytes, number of parameters, and how it was reduced."""

    began_ns: int
    ended_ns: int
    ready_ns: Sequence[int]
    full_ns: Sequence[int]
    started_ns: Sequence[int]
    done_ns: Sequence[int]
    nbytes: Sequence[int]
    parameters: Sequence[int]
    algorithms: Sequence[str]


@dataclass(frozen=True, slots=True)
class BucketTimes:
    """One bucket: when it was full and when its reduction started and ended, in milliseconds since backward began.

    `exposed_ms` is the part of the reduction that ran after backward had ended: what the step waited for.
    """

    bucket: int
    nbytes: int
    parameters: int
    algorithm: str
    ready_ms: float
    start_ms: float
    end_ms: float
    exposed_ms: float


@dataclass(frozen=True, slots=True)
class CapForecast:
    """What `bucket_cap_mb=cap_mb` would give: the number of buckets, and the exposed time that is expected."""

    cap_mb: float
    buckets: int
    exposed_ms: float


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """The last synchronised backward of this rank. `print` it, or take `as_dict()` for JSON, `scalars()` for a log.

    `caps` holds a forecast for other bucket caps: it assumes that gradients become ready when they did this time, and
    that a reduction takes the time of the cost model for its size, times `slowness`: the factor by which reductions
    of this backward were slower than the model. If `slowness` is 4 or more, the time was spent waiting for another
    rank or for a core, and no cap is recommended.
    """

    backward_ms: float
    buckets: tuple[BucketTimes, ...]
    caps: tuple[CapForecast, ...] = ()
    slowness: float = 1.0

    @property
    def communication_ms(self) -> float:
        """The total time of the reductions, which run one after the other."""
        return sum(bucket.end_ms - bucket.start_ms for bucket in self.buckets)

    @property
    def exposed_ms(self) -> float:
        """The time that the step waited for reductions after backward."""
        return sum(bucket.exposed_ms for bucket in self.buckets)

    @property
    def hidden(self) -> float:
        """The share of the communication that backward hid, 0 to 1; 1 where there was none."""
        if not self.communication_ms:
            return 1.0
        # Rounding in the sums of differences must not make it slightly negative.
        return max(0.0, 1.0 - self.exposed_ms / self.communication_ms)

    @property
    def best_cap(self) -> CapForecast | None:
        """The forecast with the least exposed time; if several have it, the one with the smallest cap."""
        return min(self.caps, key=lambda cap: (round(cap.exposed_ms, 2), cap.cap_mb), default=None)

    def scalars(self) -> dict[str, float]:
        """The values to log, by name."""
        return {
            "overlap/backward_ms": self.backward_ms,
            "overlap/communication_ms": self.communication_ms,
            "overlap/exposed_ms": self.exposed_ms,
            "overlap/hidden": self.hidden,
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "backward_ms": self.backward_ms,
            "communication_ms": self.communication_ms,
            "exposed_ms": self.exposed_ms,
            "hidden": self.hidden,
            "slowness": self.slowness,
            "buckets": [asdict(bucket) for bucket in self.buckets],
            "caps": [asdict(cap) for cap in self.caps],
        }

    def __str__(self) -> str:
        rows = [
            (b.bucket, b.nbytes, b.parameters, b.algorithm, b.ready_ms, b.start_ms, b.end_ms, b.exposed_ms)
            for b in self.buckets
        ]
        headers = ["bucket", "bytes", "parameters", "by", "ready ms", "start ms", "end ms", "exposed ms"]
        text = (
            f"{tabulate(rows, headers=headers, floatfmt='.2f')}\nbackward {self.backward_ms:.2f} ms, reductions "
            f"{self.communication_ms:.2f} ms, of which {self.exposed_ms:.2f} ms after backward: "
            f"{self.hidden:.0%} hidden"
        )
        best = self.best_cap
        if self.exposed_ms <= _LITTLE * self.backward_ms:
            return text  # there is nothing to gain
        if self.slowness >= SLOW:
            return (
                f"{text}\nreductions took {self.slowness:.0f} times what the cost model says: they waited, for a rank "
                "that came late (straggler_report tells) or for a core"
            )
        if best is None:
            return text
        if best.exposed_ms >= 0.9 * self.exposed_ms:
            return f"{text}\nno other bucket_cap_mb is expected to hide more"
        buckets = f"{best.buckets} bucket{'' if best.buckets == 1 else 's'}"
        left = f"is expected to leave {best.exposed_ms:.2f} ms after backward"
        return f"{text}\nbucket_cap_mb={best.cap_mb:g} ({buckets}) {left}"


def report(times: BackwardTimes, caps: Sequence[CapForecast] = (), slowness: float = 1.0) -> OverlapReport:
    """Makes the report of `times`, with the forecasts `caps` and the `slowness` that they assume."""

    def since(at_ns: int) -> float:
        return (at_ns - times.began_ns) / 1e6

    rows = []
    for number, (started, done) in enumerate(zip(times.started_ns, times.done_ns, strict=True)):
        exposed = max(0, done - max(times.ended_ns, started)) / 1e6
        at = since(times.full_ns[number]), since(started), since(done)
        rows.append(
            BucketTimes(number, times.nbytes[number], times.parameters[number], times.algorithms[number], *at, exposed)
        )
    return OverlapReport(since(times.ended_ns), tuple(rows), tuple(caps), slowness)


def forecast(
    times: BackwardTimes,
    entries: Sequence[Entry],
    sparse: Collection[int],
    seconds_of: Callable[[int], float],
    first_cap: int | None = None,
) -> tuple[list[CapForecast], float]:
    """Returns forecasts for other caps, and how many times the cost model's `seconds_of(nbytes)` reductions took.

    `entries` are the parameters by their places, as `assign` takes them. Those at `sparse`, and delayed ones, have
    buckets of their own whatever the cap, and are left out. `first_cap` is the cap of the first bucket in bytes, if
    that differs.
    """
    dense = [at for at, ready in enumerate(times.ready_ns) if ready and at not in sparse]
    order = sorted(dense, key=lambda at: times.ready_ns[at])
    own = [at for at, algorithm in enumerate(times.algorithms) if algorithm != SPARSE_ROWS]
    modelled = sum(seconds_of(times.nbytes[at]) for at in own)
    measured = sum(times.done_ns[at] - times.started_ns[at] for at in own) / 1e9
    slowness = measured / modelled if modelled else 1.0
    if not order or slowness >= SLOW:
        return [], slowness
    found = []
    for cap_mb in _CAPS_MB:
        cap = cap_mb * MIB
        buckets = assign(entries, order, [cap if first_cap is None else min(first_cap, cap), cap])
        free = 0.0  # when the last reduction is over, in seconds since backward began
        for indices in buckets:
            full = (max(times.ready_ns[at] for at in indices) - times.began_ns) / 1e9
            nbytes = sum(entries[at].nbytes for at in indices)
            free = max(free, full) + seconds_of(nbytes) * slowness
        exposed = max(0.0, free - (times.ended_ns - times.began_ns) / 1e9)
        found.append(CapForecast(cap_mb, len(buckets), exposed * 1e3))
    return found, slowness


def trace(times: BackwardTimes, tracer: Tracer) -> None:
    """Adds one backward to the trace; on a line "buckets", when each bucket was full, and its reduction."""
    for number, (started, done) in enumerate(zip(times.started_ns, times.done_ns, strict=True)):
        nbytes = times.nbytes[number]
        tracer.instant("ddp", f"bucket {number} ready", times.full_ns[number], "buckets", bytes=nbytes)
        name = f"bucket {number} ({times.algorithms[number]})"
        tracer.span("ddp", name, started, done, "buckets", bytes=nbytes)
    tracer.span("ddp", "backward", times.began_ns, times.ended_ns)
