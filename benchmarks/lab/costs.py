"""α, β, λ of the laboratory's links and what a call takes, fitted to a few all-reduces between its hosts."""

from __future__ import annotations

import statistics
import time

import torch

import ringred
from ringred.collectives.registry import lookup
from ringred.runtime.select import share_bounds
from ringred.schedule.cost import simulate
from ringred.topology.calibrate import Costs, Sample, fit, rounded

__all__ = ["calibrate"]

_SHORT = (1 << 10, 4 << 10, 16 << 10)
_LONG = (4 << 20, 12 << 20)  # long enough that what a queue lets pass at once does not count
_CALLS = 7


def calibrate(comm: ringred.Communicator) -> Costs:
    """The costs, the same on all ranks, by which "auto" chooses from now on. Short messages of all ranks tell of α and
    λ, long ones between two hosts alone of β: many senders to one port are no property of a link. Collective."""
    samples = [_sample(comm, name, nbytes) for name in ("ring", "halving_doubling", "direct") for nbytes in _SHORT]
    pair = comm.split(0 if comm.rank < 2 else None)
    if pair is not None:
        samples += [_sample(pair, "ring", nbytes) for nbytes in _LONG]
        pair.close()
    found = torch.tensor(fit(samples), dtype=torch.float64)
    comm.broadcast(found, 0)
    costs = rounded(found.tolist())
    comm.tune({"tensor": costs, "between": costs})
    return costs


def _sample(comm: ringred.Communicator, name: str, nbytes: int) -> Sample:
    tensor, times = torch.zeros(nbytes // 4), []
    for _ in range(_CALLS):
        comm.barrier()
        began = time.perf_counter()
        comm.all_reduce(tensor, algorithm=name)
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times[1:])
    comm.all_reduce(slowest, "max")
    entry = lookup("all_reduce", name)
    group = entry.group(comm.size)
    steps, bounds = entry.steps(group), share_bounds(nbytes, entry.units(group))

    def priced(alpha: float, beta: float, latency: float) -> float:
        return simulate(comm.size, steps, bounds, lambda sender, receiver: (alpha, beta, latency), 0.0).seconds

    return Sample(priced(1, 0, 0), priced(0, 1, 0), 0, priced(0, 0, 1), 1, statistics.median(slowest.tolist()))
