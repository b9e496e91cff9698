"""What the simulator says of the laboratory's cases, from costs that were measured between its hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from lab.hosts import BURST_BYTES
from lab.network import Network
from lab.profiles import Profile
from ringred.buckets import FIRST_BUCKET_BYTES, MIB, Entry, assign
from ringred.collectives.registry import lookup
from ringred.runtime.select import CROWDED, choose, costs_of, machine_model, segments_for, share_bounds
from ringred.schedule.alike import simulate_alike
from ringred.schedule.cost import Job, simulate
from ringred.schedule.ir import Group, Op
from ringred.schedule.network import Port, Ports, simulate_jobs
from ringred.topology import calibrate
from ringred.topology.model import Topology, hosts

__all__ = [
    "Costs",
    "Step",
    "all_reduce_job",
    "all_reduce_seconds",
    "buckets_of",
    "filled",
    "job_of",
    "linear",
    "ports_of",
    "simulated",
    "step_of",
]

Schedule: TypeAlias = Callable[[int], Iterable[tuple[Op, ...]]]
"""The steps of each rank."""

_CAPS = (FIRST_BUCKET_BYTES, 25 * MIB)
_CUT_RANKS = 16  # of more, messages are whole in a simulation
_DEPTH = 8  # of the transports between hosts
_SETTLED = 8 << 20  # bytes after which several senders use a port as well as one does


@dataclass(frozen=True)
class Costs:
    """α, β, γ, λ between two hosts, and what a call takes beside, in seconds; the greatest message in bytes; how many
    processors all hosts share (0: each has its own), and a processor's seconds to send or to receive a byte; how many
    times as long a byte takes at a port that several send to at once; whether messages leave once they are expected;
    a processor's seconds to send or to receive a byte that is encrypted, as those of parameter servers are."""

    alpha: float
    beta: float
    gamma: float
    latency: float
    call: float
    segment: int
    cores: int = 0
    copy: float = 0.0
    crowded: float = 1.0
    posted: bool = False
    cipher: float = 0.0

    tuning: calibrate.Tuning | None = None
    """By what "auto" chose, if not by the same; its "tensor" is what ranks of one host cost each other."""

    def topology(self, network: Network) -> Topology:
        """The ranks of a network, with these links between its hosts."""
        alpha, beta, _, latency, _ = (0.0,) * 5 if self.tuning is None else self.tuning["tensor"]
        between = self.alpha, self.beta, self.latency, CROWDED * self.beta
        return hosts(network.host_of_rank, (alpha, beta, latency), between, self.gamma, "lab", self.call)

    def choice(self, network: Network, nbytes: int) -> Topology:
        """The same, as "auto" saw it."""
        if self.tuning is None:
            return self.topology(network)
        return machine_model("shm+lab", tuple(network.host_of_rank), self.tuning, costs_of("tensor", nbytes))


@dataclass(frozen=True)
class Step:
    """A predicted step: its seconds, and those of its reductions after backward."""

    seconds: float
    exposed: float
    ready: Sequence[float]
    times: Sequence[tuple[float, float]]


def all_reduce_job(name: str, nbytes: int, costs: Costs, network: Network, ready: Sequence[float] | None = None) -> Job:
    """An all-reduce among all ranks of a network, each of which has its data when it is `ready` (at once, if None);
    "auto" is what ringred chooses by the costs."""
    size = network.ranks
    if name == "auto":
        entry, chosen = choose("all_reduce", nbytes, costs.choice(network, nbytes))
        grid = chosen.grid
    else:
        entry = lookup("all_reduce", name)
        grid = (network.each, network.hosts) if entry.grids and network.each > 1 else None
    group = entry.group(size, grid=grid, segments=segments_for(nbytes, costs.segment))
    return job_of(entry.steps(group), share_bounds(nbytes, entry.units(group)), ready or [0.0] * size, costs)


def job_of(schedule: Schedule, bounds: Sequence[tuple[int, int]], ready: Sequence[float], costs: Costs) -> Job:
    """A job as the transports between hosts do it: cut into messages, unless too many ranks take part."""
    cut = len(ready) <= _CUT_RANKS
    return Job(schedule, bounds, ready, costs.segment if cut else None, _DEPTH if cut else 1, cut and costs.posted)


def ports_of(network: Network, costs: Costs) -> Ports:
    """The queues that a message passes: its sender's, with racks those of the uplinks, and the switch's to its
    receiver; none within a host. β is that of a usual port."""
    host_of_rank = network.host_of_rank

    def port(number: int, mbit: float) -> Port:
        return Port(number, costs.beta * network.mbit / mbit, BURST_BYTES, costs.crowded, _SETTLED)

    def ports(sender: int, receiver: int) -> tuple[list[Port], list[Port]]:
        one, other = host_of_rank[sender], host_of_rank[receiver]
        if one == other:
            return [], []
        out, into = [port(one, network.mbit_of(one))], [port(1000 + other, network.mbit_of(other))]
        here, there = network.rack_of(one), network.rack_of(other)
        if here != there:
            out.append(port(2000 + here, network.uplink_mbit))
            into.insert(0, port(3000 + there, network.uplink_mbit))
        return out, into

    return ports


def simulated(jobs: Sequence[Job], costs: Costs, network: Network) -> tuple[float, list[tuple[float, float]]]:
    """The seconds of jobs among all ranks of a network, one after the other, and when each began and was done."""
    link = cache(costs.topology(network).link)
    options = {"ports": cache(ports_of(network, costs)), "call": costs.call}
    options |= {"cores": costs.cores, "copy": costs.copy}
    cost, times = simulate_jobs(network.ranks, jobs, link, costs.gamma, **options)
    return cost.seconds, times


def all_reduce_seconds(name: str, nbytes: int, costs: Costs, network: Network) -> float:
    """The time of an all-reduce among all ranks of a network."""
    return simulated([all_reduce_job(name, nbytes, costs, network)], costs, network)[0]


def buckets_of(model: Profile, caps: Sequence[int] = _CAPS) -> list[list[int]]:
    """The layers of each bucket, as DistributedDataParallel fills them."""
    entries = [Entry(4 * layer.elements, "float32") for layer in model.layers]
    return assign(entries, list(reversed(range(len(entries)))), caps)


def filled(model: Profile, dilation: float, caps: Sequence[int] = _CAPS) -> tuple[list[int], list[float]]:
    """The bytes of each bucket, and when backward has filled it, in seconds since the step began."""
    ends, now = [0.0] * len(model.layers), model.forward * dilation
    for at in reversed(range(len(model.layers))):
        now += model.backward[at] * dilation
        ends[at] = now
    buckets = buckets_of(model, caps)
    sizes = [sum(4 * model.layers[at].elements for at in layers) for layers in buckets]
    return sizes, [max(ends[at] for at in layers) for layers in buckets]


def step_of(
    model: Profile,
    dilation: float,
    name: str,
    costs: Costs,
    network: Network,
    *,
    caps: Sequence[int] = _CAPS,
    slowness: float = 1.0,
    seconds_of: Callable[[int], float] | None = None,
) -> Step:
    """A training step on all hosts, each bucket reduced as soon as it is full and those before it are done; the last
    host computes `slowness` times as long.

    With `seconds_of`, a bucket of so many bytes takes that long, and nothing is simulated: for thousands of ranks.
    """
    sizes, ready = filled(model, dilation, caps)
    now = model.seconds * dilation
    if seconds_of is None:
        jobs = [
            all_reduce_job(name, nbytes, costs, network, network.times(when, slowness))
            for nbytes, when in zip(sizes, ready, strict=True)
        ]
        _, times = simulated(jobs, costs, network)
        now *= slowness
    else:
        times, free = [], 0.0
        for nbytes, when in zip(sizes, ready, strict=True):
            began = max(free, when)
            free = began + seconds_of(nbytes)
            times.append((began, free))
    over = max(now, times[-1][1])
    return Step(over, over - now, ready, times)


def linear(
    name: str, group: Group, topology: Topology, small: int, large: int, *, alike: bool = False
) -> Callable[[int], float]:
    """The seconds of an all-reduce of any size, from those of two: with links of α and β the time of whole messages on
    one critical path is a straight line in the bytes. `alike`: all ranks are, if units are equal (`simulate_alike`)."""
    entry = lookup("all_reduce", name)
    if alike:
        units = entry.units(group)
        small, large = (-(-nbytes // units) * units for nbytes in (small, large))

    def simulated(nbytes: int) -> float:
        what = group.size, entry.steps(group), share_bounds(nbytes, entry.units(group)), topology.link, topology.gamma
        return (simulate_alike if alike else simulate)(*what).seconds

    low, high = simulated(small), simulated(large)
    slope = (high - low) / (large - small)
    return lambda nbytes: low + slope * (nbytes - small)
