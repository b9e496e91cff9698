"""What of the communication backward has hidden: bucket by bucket, from the clock of one iteration, and what another
cap would hide."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from ringred.buckets import MIB, Entry, assign
from ringred.data_parallel.reductions import SPARSE_ROWS
from ringred.runtime.trace import Tracer

__all__ = ["BackwardTimes", "BucketTimes", "CapForecast", "OverlapReport", "forecast", "report", "trace"]

_CAPS_MB = (1, 2, 5, 10, 25, 50, 100)  # that are tried
_LITTLE = 0.05  # of backward, below which nothing is worth a word
SLOW = 4.0  # times the model's time, from which a reduction waited more than it worked


@dataclass(slots=True)
class BackwardTimes:
    """The times of one backward, in ns of `time.monotonic_ns`: `ready_ns` of parameters by their places, 0 of delayed
    ones; the others of buckets in their order: bytes, number of parameters, and how they were reduced."""

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
    """One bucket in milliseconds since backward began: full, its reduction started and ended.

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

    `caps` holds a forecast for other bucket caps: gradients come when they came this time, and a reduction takes what
    the cost model says of its size, times what the model was off by in this backward. Where it was off by `slowness`
    of 4 or more the time went to waiting, for another rank or a core, and no cap is advised.
    """

    backward_ms: float
    buckets: tuple[BucketTimes, ...]
    caps: tuple[CapForecast, ...] = ()
    slowness: float = 1.0

    @property
    def communication_ms(self) -> float:
        """The time in which at least one reduction ran: they run one after the other."""
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
        # Sums of differences: rounding must not make it a hair less than nothing.
        return max(0.0, 1.0 - self.exposed_ms / self.communication_ms)

    @property
    def best_cap(self) -> CapForecast | None:
        """The forecast with the least exposed time, of the smallest cap where several have it."""
        return min(self.caps, key=lambda cap: (round(cap.exposed_ms, 2), cap.cap_mb), default=None)

    def scalars(self) -> dict[str, float]:
        """What a log keeps of it, by name."""
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
    """What `times` say, with the forecasts and what they rest on."""

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
    """What other caps would give, and by what reductions took longer than `seconds_of(nbytes)`, the cost model, says.

    `entries` are the parameters by their places, as `assign` takes them. Those at `sparse`, and delayed ones, have
    buckets of their own whatever the cap, and are left out. `first_cap` is that of the first bucket in bytes, if it is
    another.
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
    """Draws one backward: itself, and each bucket's becoming full and its reduction on a line of their own."""
    for number, (started, done) in enumerate(zip(times.started_ns, times.done_ns, strict=True)):
        nbytes = times.nbytes[number]
        tracer.instant("ddp", f"bucket {number} ready", times.full_ns[number], "buckets", bytes=nbytes)
        name = f"bucket {number} ({times.algorithms[number]})"
        tracer.span("ddp", name, started, done, "buckets", bytes=nbytes)
    tracer.span("ddp", "backward", times.began_ns, times.ended_ns)
