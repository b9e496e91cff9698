"""Finds late ranks: compares when each rank has all of its gradients, before it waits for another rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate

from ringred.communicator import Communicator

__all__ = ["RankTimes", "StragglerReport", "straggler_report"]

_NOTABLE = 0.5  # a rank that causes at least this share of all waiting is called a straggler
_SLOWER = 0.05  # if ranks wait for at least this fraction of an iteration


@dataclass(frozen=True, slots=True)
class RankTimes:
    """One rank: the median of its own time per iteration, its mean wait for the last rank to arrive, how often it was
    that last rank, and the fraction of all ranks' waiting that it caused."""

    rank: int
    host: int
    busy_ms: float
    waits_ms: float
    last: int
    caused: float


@dataclass(frozen=True, slots=True)
class StragglerReport:
    """The last `iterations` backwards of all ranks, the same on each rank. `print` it, or take `as_dict()` for JSON.

    All ranks leave a reduction at about the same moment. From there each rank measures the time until its last bucket
    is full, so that clocks of different hosts are never compared. In each iteration, the waiting between the
    second-to-last and the last arrival is attributed to the last rank; the waiting between the third-to-last and the
    second-to-last arrival is attributed to the last two ranks, and so on.
    """

    iterations: int
    ranks: tuple[RankTimes, ...]

    @property
    def waiting(self) -> float:
        """The mean part of an iteration that a rank spends waiting for others."""
        whole = sum(r.busy_ms + r.waits_ms for r in self.ranks)
        return sum(r.waits_ms for r in self.ranks) / whole if whole else 0.0

    @property
    def straggler(self) -> int | None:
        """The rank that causes half of all waiting or more, if ranks wait long enough for it to matter; else None."""
        if len(self.ranks) < 2 or self.waiting < _SLOWER:
            return None
        worst = max(self.ranks, key=lambda r: r.caused)
        return worst.rank if worst.caused >= _NOTABLE else None

    def scalars(self) -> dict[str, float]:
        """The values to log, by name."""
        found = {"straggler/waiting": self.waiting}
        for r in self.ranks:
            found[f"straggler/rank{r.rank}/busy_ms"] = r.busy_ms
            found[f"straggler/rank{r.rank}/caused"] = r.caused
        return found

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        ranks = [asdict(r) for r in self.ranks]
        return {"iterations": self.iterations, "waiting": self.waiting, "straggler": self.straggler, "ranks": ranks}

    def __str__(self) -> str:
        if not self.iterations:
            return "no two synchronised backwards were made yet: nothing is known of stragglers"
        rows = [(r.rank, r.host, r.busy_ms, r.waits_ms, r.last, f"{r.caused:.0%}") for r in self.ranks]
        headers = ["rank", "host", "busy ms", "waits ms", "last", "caused of all waiting"]
        table = tabulate(rows, headers=headers, floatfmt=".2f")
        who = "no rank holds the others up"
        if self.straggler is not None:
            caused = self.ranks[self.straggler].caused
            who = f"rank {self.straggler} is the straggler: it causes {caused:.0%} of it"
        return f"{table}\n{self.iterations} iterations; ranks wait {self.waiting:.0%} of the time for others; {who}"


def straggler_report(comm: Communicator, arrivals: Sequence[float]) -> StragglerReport:
    """Makes the report from this rank's seconds for its last iterations: for as many as every rank has. Collective.

    It is noted in the trace, where one is made.
    """
    found = _report(comm, arrivals)
    if comm.tracer is not None:
        name = "no straggler" if found.straggler is None else f"rank {found.straggler} is the straggler"
        comm.tracer.instant("ddp", name, time.monotonic_ns(), **found.as_dict())
    return found


def _report(comm: Communicator, arrivals: Sequence[float]) -> StragglerReport:
    count = torch.tensor([len(arrivals)])
    comm.all_reduce(count, "min")
    kept = list(arrivals)[len(arrivals) - int(count) :]
    table = torch.empty(comm.size * len(kept), dtype=torch.float64)
    comm.all_gather(table, torch.tensor(kept, dtype=torch.float64))
    times = table.view(comm.size, len(kept))
    if not kept:
        return StragglerReport(0, tuple(RankTimes(r, comm.hosts[r], 0.0, 0.0, 0, 0.0) for r in range(comm.size)))
    waits = times.max(0).values - times
    caused = _caused(times)
    total = caused.sum().item()
    last = torch.bincount(times.argmax(0), minlength=comm.size)
    return StragglerReport(
        len(kept),
        tuple(
            RankTimes(
                rank,
                comm.hosts[rank],
                times[rank].median().item() * 1e3,
                waits[rank].mean().item() * 1e3,
                int(last[rank]),
                caused[rank].item() / total if total else 0.0,
            )
            for rank in range(comm.size)
        ),
    )


def _caused(times: torch.Tensor) -> torch.Tensor:
    """The rank-seconds of waiting that each rank causes, from arrivals by rank and iteration.

    Between the k-th and the next arrival, k ranks wait for the ranks that have not arrived, which share the cost.
    """
    size = times.shape[0]
    ordered, order = times.sort(0)
    gaps = ordered.diff(dim=0)  # gap k: from arrival k to arrival k + 1
    arrived = torch.arange(1, size, dtype=times.dtype).unsqueeze(1)
    shares = gaps * arrived / (size - arrived)  # for each rank that has not arrived
    by_place = torch.cat([torch.zeros_like(times[:1]), shares.cumsum(0)])
    return torch.zeros_like(times).scatter_(0, order, by_place).sum(1)
