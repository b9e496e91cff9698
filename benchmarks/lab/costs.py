"""Calibration: a few all-reduces among the hosts, long ones between two, and costs fitted to them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from scipy.optimize import minimize

import ringred
from lab.network import Network
from lab.predict import Costs, all_reduce_job, simulated
from ringred.collectives.registry import lookup
from ringred.parameter_server.keys import encryption_rate
from ringred.runtime.probe import probe
from ringred.runtime.select import CROWDED, share_bounds
from ringred.schedule.cost import simulate
from ringred.topology import calibrate
from ringred.topology.detect import machine

__all__ = ["calibrated", "fitted"]

_SHORT = (1 << 10, 16 << 10, 64 << 10, 256 << 10)
_ALGORITHMS = ("ring", "halving_doubling", "direct", "tree")
_SHARED = 2 << 20  # by all hosts, whose processors it keeps busy
_SHARED_WEIGHT = 4  # so few against the short ones
_LARGE = ("ring", "tree", "direct", "central")  # by one sender to a port, by two, by all to all, by all to one
_WITHIN = ("tensor", "window", "short tensor", "short window")
_LONG = (4 << 20, 12 << 20)
_CALLS, _WARM_CALLS = 15, 5


@dataclass(frozen=True)
class Sample:
    """A measured all-reduce: its algorithm, its ranks and bytes, and the median of its seconds."""

    name: str
    ranks: int
    nbytes: int
    seconds: float


def calibrated(comm: ringred.Communicator, servers: bool = False) -> dict[str, Any]:
    """The samples, the same on all ranks, and the costs by which "auto" chooses from the first time on. Collective.

    With `servers`, also what encryption costs. It is done before and after what is measured: the machine's other users
    are not the same all the time.
    """
    hosts = len(set(comm.hosts))
    cases = [("all", name, nbytes) for name in _ALGORITHMS for nbytes in _SHORT]
    cases += [("all", name, _SHARED) for name in _LARGE]
    cases += [("pair", "ring", nbytes) for nbytes in _LONG]
    times = torch.zeros(len(cases), dtype=torch.float64)
    first = comm.rank == comm.local_ranks[0]  # of its host
    leaders = comm.split(0 if first else None)
    pair = comm.split(0 if first and comm.hosts[comm.rank] < 2 else None)
    for number, (who, name, nbytes) in enumerate(cases):
        by = leaders if who == "all" else pair
        if by is not None:
            times[number] = _seconds(by, name, nbytes)
    for made in (leaders, pair):
        if made is not None:
            made.close()
    comm.broadcast(times, 0)
    samples = [
        Sample(name, hosts if who == "all" else 2, nbytes, seconds)
        for (who, name, nbytes), seconds in zip(cases, times.tolist(), strict=True)
    ]
    if "between" not in comm.tuning:
        between = calibrate.rounded(calibrate.fit([_priced(sample) for sample in samples]))
        comm.tune({"tensor": between, **_within(comm), "between": between})
    found = {"samples": [asdict(sample) for sample in samples], "segment": comm.transport.segment_bytes}
    return found | {"tuning": comm.tuning} | ({"cipher": _cipher(comm)} if servers else {})


def _cipher(comm: ringred.Communicator) -> float:
    """A processor's seconds to encrypt and send a byte, or to receive and decrypt it, while all ranks do so at once, as
    they do on servers: messages that are first the one and then the other, by the one thread of a ZeroMQ context."""
    comm.barrier()
    found = torch.tensor([0.5 / statistics.median(encryption_rate() for _ in range(5))], dtype=torch.float64)
    comm.all_reduce(found, "avg")
    return found.item() * min(1.0, machine().usable_cores / comm.size)


def _within(comm: ringred.Communicator) -> calibrate.Tuning:
    """What ranks of one host cost each other, as rank 0's find it while the others wait; nothing, if it is alone."""
    if len(comm.local_ranks) == 1:
        return {}
    host = comm.split(comm.hosts[comm.rank])
    assert host is not None, "every rank has a host"
    table = torch.zeros(len(_WITHIN), 5, dtype=torch.float64)
    if comm.hosts[comm.rank] == 0:
        found = probe(host)
        table = torch.tensor([found.get(kind, found["tensor"]) for kind in _WITHIN], dtype=torch.float64)
    host.close()
    comm.broadcast(table, 0)
    return {kind: calibrate.rounded(costs) for kind, costs in zip(_WITHIN, table.tolist(), strict=True)}


def _seconds(comm: ringred.Communicator, name: str, nbytes: int) -> float:
    """The median of an all-reduce's calls, each of which takes as long as its last rank."""
    tensor, times = torch.zeros(nbytes // 4), []
    warm, calls = (1, 6) if nbytes > max(_SHORT) else (_WARM_CALLS, _CALLS)
    for _ in range(warm + calls):
        comm.barrier()
        began = time.perf_counter()
        comm.all_reduce(tensor, algorithm=name)
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times[warm:])
    comm.all_reduce(slowest, "max")
    return statistics.median(slowest.tolist())


def _priced(sample: Sample) -> calibrate.Sample:
    """What `fit` asks for. Short messages pass in a queue's burst: they tell nothing of β."""
    entry = lookup("all_reduce", sample.name)
    group = entry.group(sample.ranks)
    bounds = share_bounds(sample.nbytes, entry.units(group))

    def priced(alpha: float, beta: float, latency: float) -> float:
        links = (alpha, beta, latency, CROWDED * beta)
        return simulate(sample.ranks, entry.steps(group), bounds, lambda sender, receiver: links, 0.0).seconds

    nbytes = priced(0, 1, 0) if sample.nbytes > max(_SHORT) else 0.0
    return calibrate.Sample(priced(1, 0, 0), nbytes, 0, priced(0, 0, 1), 1, sample.seconds)


def fitted(runs: Sequence[dict[str, Any]], network: Network, cores: int, posted: bool = False) -> Costs:
    """The costs that explain what `calibrated` measured, some times, best by relative error of the medians: α, λ, what
    a call and a byte cost and what a crowded port does, by samples of all hosts, and β by long ones of two. The hosts
    share `cores` processors. `posted`: a message waits until it is expected."""
    several = zip(*([Sample(**sample) for sample in run["samples"]] for run in runs), strict=True)
    samples = [replace(same[0], seconds=statistics.median(sample.seconds for sample in same)) for same in several]
    short = [sample for sample in samples if sample.nbytes < min(_LONG)]
    low, high = (sample for sample in samples if sample.nbytes >= min(_LONG))
    # On two ranks all bytes go both ways, at once.
    beta = (high.seconds - low.seconds) / (high.nbytes - low.nbytes)
    segment, tuning, one_each = runs[0]["segment"], runs[0]["tuning"], network.one_each
    cipher = statistics.median(run.get("cipher", 0.0) for run in runs)

    def costs(logarithms: Sequence[float]) -> Costs:
        alpha, latency, call, copy, crowded = map(math.exp, logarithms)
        return Costs(alpha, beta, 0.0, latency, call, segment, cores, copy, 1 + crowded, posted, cipher, tuning)

    some = costs([0.0] * 5)  # a job's messages depend on the segment alone, and on whether they are posted
    jobs = [all_reduce_job(sample.name, sample.nbytes, some, one_each) for sample in short]

    def error(logarithms: Sequence[float]) -> float:
        found = costs(logarithms)
        return sum(
            (_SHARED_WEIGHT if sample.nbytes == _SHARED else 1)
            * math.log(simulated([job], found, one_each)[0] / sample.seconds) ** 2
            for sample, job in zip(short, jobs, strict=True)
        )

    few = math.log(1e-2 * min(sample.seconds for sample in short))
    starts = ((few, few), (few + 3, few), (few, few + 3))
    tries = (_least(error, [alpha, few, call, math.log(beta / 20), math.log(0.4)]) for alpha, call in starts)
    return costs(min(tries, key=error))


def _least(error: Callable[[Sequence[float]], float], start: list[float]) -> Sequence[float]:
    """Where `error` is least, from a simplex around `start`."""
    simplex = [start] + [[x + (place == at) for place, x in enumerate(start)] for at in range(len(start))]
    options = {"maxfev": 250, "initial_simplex": simplex}
    return list(minimize(error, start, method="Nelder-Mead", options=options).x)
