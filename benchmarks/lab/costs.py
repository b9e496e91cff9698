"""Calibration: a few all-reduces among the hosts, long ones between two, and costs fitted to them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import minimize

import ringred
from lab.hosts import Network
from lab.predict import Costs, all_reduce_seconds
from ringred.collectives.registry import lookup
from ringred.runtime.select import share_bounds
from ringred.schedule.cost import simulate
from ringred.topology import calibrate

__all__ = ["calibrated", "fitted"]

_SHORT = (1 << 10, 16 << 10, 64 << 10, 256 << 10)
_ALGORITHMS = ("ring", "halving_doubling", "direct", "tree")
_SHARED = 2 << 20  # by all hosts, whose processors it keeps busy
_SHARED_WEIGHT = 4  # so few against the short ones
_LONG = (4 << 20, 12 << 20)
_CALLS, _WARM_CALLS = 15, 5


@dataclass(frozen=True)
class Sample:
    """A measured all-reduce: its algorithm, its ranks and bytes, and the median of its seconds."""

    name: str
    ranks: int
    nbytes: int
    seconds: float


def calibrated(comm: ringred.Communicator) -> dict[str, Any]:
    """The samples, the same on all ranks, and the costs by which "auto" chooses from the first time on. Collective.

    It is done before and after what is measured: the machine's other users are not the same all the time.
    """
    samples = [_sample(comm, name, nbytes) for name in _ALGORITHMS for nbytes in _SHORT]
    samples += [_sample(comm, name, _SHARED) for name in ("ring", "tree")]
    pair = comm.split(0 if comm.rank < 2 else None)
    long = [Sample("ring", 2, nbytes, 0.0) for nbytes in _LONG]
    if pair is not None:
        long = [_sample(pair, "ring", nbytes) for nbytes in _LONG]
        pair.close()
    times = torch.tensor([sample.seconds for sample in samples + long], dtype=torch.float64)
    comm.broadcast(times, 0)
    samples = [
        Sample(known.name, known.ranks, known.nbytes, seconds)
        for known, seconds in zip(samples + long, times.tolist(), strict=True)
    ]
    if "tensor" not in comm.tuning:
        costs = calibrate.rounded(calibrate.fit([_priced(sample) for sample in samples]))
        comm.tune({"tensor": costs, "between": costs})
    found = {"samples": [asdict(sample) for sample in samples], "segment": comm.transport.segment_bytes}
    return found | {"choosing": list(comm.tuning["tensor"])}


def _sample(comm: ringred.Communicator, name: str, nbytes: int) -> Sample:
    tensor, times = torch.zeros(nbytes // 4), []
    warm, calls = (1, 6) if nbytes > max(_SHORT) else (_WARM_CALLS, _CALLS)
    for _ in range(warm + calls):
        comm.barrier()
        began = time.perf_counter()
        comm.all_reduce(tensor, algorithm=name)
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times[warm:])
    comm.all_reduce(slowest, "max")
    return Sample(name, comm.size, nbytes, statistics.median(slowest.tolist()))


def _priced(sample: Sample) -> calibrate.Sample:
    """What `fit` asks for. Short messages pass in a queue's burst: they tell nothing of β."""
    entry = lookup("all_reduce", sample.name)
    group = entry.group(sample.ranks)
    bounds = share_bounds(sample.nbytes, entry.units(group))

    def priced(alpha: float, beta: float, latency: float) -> float:
        links = (alpha, beta, latency)
        return simulate(sample.ranks, entry.steps(group), bounds, lambda sender, receiver: links, 0.0).seconds

    nbytes = priced(0, 1, 0) if sample.nbytes > max(_SHORT) else 0.0
    return calibrate.Sample(priced(1, 0, 0), nbytes, 0, priced(0, 0, 1), 1, sample.seconds)


def fitted(runs: Sequence[dict[str, Any]], network: Network, cores: int) -> Costs:
    """The costs that explain what `calibrated` measured, some times, best by relative error: α, λ, and what a call and
    a byte cost, by short samples, and β by long ones. The hosts share `cores` processors."""
    samples = [[Sample(**sample) for sample in run["samples"]] for run in runs]
    short = [sample for run in samples for sample in run if sample.nbytes < min(_LONG)]
    pairs = [[sample for sample in run if sample.nbytes >= min(_LONG)] for run in samples]
    # On two ranks all bytes go both ways, at once.
    beta = min((high.seconds - low.seconds) / (high.nbytes - low.nbytes) for low, high in pairs)
    segment, choosing = runs[0]["segment"], tuple(runs[0]["choosing"])

    def costs(logarithms: Sequence[float]) -> Costs:
        alpha, latency, call, copy = map(math.exp, logarithms)
        return Costs(alpha, beta, 0.0, latency, call, segment, cores, copy, choosing)

    def error(logarithms: Sequence[float]) -> float:
        found, known = costs(logarithms), {}
        for sample in short:
            case = sample.name, sample.nbytes
            if case not in known:
                known[case] = all_reduce_seconds(*case, found, network)
        return sum(
            (_SHARED_WEIGHT if sample.nbytes == _SHARED else 1)
            * math.log(known[sample.name, sample.nbytes] / sample.seconds) ** 2
            for sample in short
        )

    few = math.log(1e-2 * min(sample.seconds for sample in short))
    tries = (
        minimize(error, [alpha, few, call, math.log(beta / 20)], method="Nelder-Mead", options={"maxfev": 200})
        for alpha, call in ((few, few), (few + 3, few), (few, few + 3))
    )
    return costs(list(min(tries, key=lambda found: found.fun).x))
