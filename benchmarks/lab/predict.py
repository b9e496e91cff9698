"""What the simulator says of the laboratory's cases, from costs that were measured between its hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.hosts import BURST_BYTES, Network
from lab.profiles import Profile
from ringred.buckets import FIRST_BUCKET_BYTES, MIB, Entry, assign
from ringred.collectives.registry import lookup
from ringred.runtime.select import CROWDED, choose, segments_for, share_bounds
from ringred.schedule.cost import Job
from ringred.schedule.ir import Group
from ringred.schedule.network import Port, Ports, simulate_jobs
from ringred.topology.model import Topology

__all__ = ["Costs", "Step", "all_reduce_seconds", "buckets_of", "linear", "ports_of", "step_of"]

_CAPS = (FIRST_BUCKET_BYTES, 25 * MIB)
_CUT_RANKS = 16  # of more, messages are whole in a simulation
_DEPTH = 8  # of the transports between hosts


@dataclass(frozen=True)
class Costs:
    """α, β, γ, λ between two hosts, and what a call takes beside, in seconds; the greatest message in bytes; how many
    processors all hosts share (0: each has its own), and a processor's seconds to send or to receive a byte."""

    alpha: float
    beta: float
    gamma: float
    latency: float
    call: float
    segment: int
    cores: int = 0
    copy: float = 0.0

    choosing: tuple[float, float, float, float, float] | None = None
    """α, β, γ, λ and a call's cost by which "auto" chose, if not by the same."""

    def topology(self, size: int) -> Topology:
        """Ranks with these links between all of them."""
        return _topology(size, (self.alpha, self.beta, self.gamma, self.latency, self.call))

    def choice(self, size: int) -> Topology:
        """The same, as "auto" saw it."""
        return self.topology(size) if self.choosing is None else _topology(size, self.choosing)


def _topology(size: int, costs: tuple[float, float, float, float, float]) -> Topology:
    alpha, beta, gamma, latency, call = costs
    links = ((alpha, beta, latency, CROWDED * beta),)
    return Topology(size, links, gamma, tuple((rank,) for rank in range(size)), "lab", call)


@dataclass(frozen=True)
class Step:
    """A predicted step: its seconds, and those of its reductions after backward."""

    seconds: float
    exposed: float
    ready: Sequence[float]
    times: Sequence[tuple[float, float]]


def _job(name: str, size: int, nbytes: int, costs: Costs, ready: Sequence[float]) -> Job:
    """One all-reduce; "auto" is what ringred chooses by the costs."""
    grid = None
    if name == "auto":
        entry, chosen = choose("all_reduce", nbytes, costs.choice(size))
        grid = chosen.grid
    else:
        entry = lookup("all_reduce", name)
    group = entry.group(size, grid=grid, segments=segments_for(nbytes, costs.segment))
    cut = size <= _CUT_RANKS
    return Job(
        entry.steps(group),
        share_bounds(nbytes, entry.units(group)),
        ready,
        costs.segment if cut else None,
        _DEPTH if cut else 1,
    )


def ports_of(network: Network, costs: Costs) -> Ports:
    """The queues that a message passes: its sender's, with racks those of the uplinks, and the switch's to its
    receiver. β is that of a usual port."""

    def port(number: int, mbit: float) -> Port:
        return Port(number, costs.beta * network.mbit / mbit, BURST_BYTES)

    def ports(sender: int, receiver: int) -> tuple[list[Port], list[Port]]:
        out, into = [port(sender, network.mbit_of(sender))], [port(1000 + receiver, network.mbit_of(receiver))]
        here, there = network.rack_of(sender), network.rack_of(receiver)
        if here != there:
            out.append(port(2000 + here, network.uplink_mbit))
            into.insert(0, port(3000 + there, network.uplink_mbit))
        return out, into

    return ports


def _simulated(jobs: Sequence[Job], costs: Costs, network: Network) -> tuple[float, list[tuple[float, float]]]:
    size = network.hosts
    link = costs.topology(size).link
    options = {"ports": ports_of(network, costs), "call": costs.call}
    options |= {"cores": costs.cores, "copy": costs.copy}
    cost, times = simulate_jobs(size, jobs, link, costs.gamma, **options)
    return cost.seconds, times


def all_reduce_seconds(name: str, nbytes: int, costs: Costs, network: Network) -> float:
    """The time of an all-reduce among all hosts of a network."""
    return _simulated([_job(name, network.hosts, nbytes, costs, [0.0] * network.hosts)], costs, network)[0]


def buckets_of(model: Profile, caps: Sequence[int] = _CAPS) -> list[list[int]]:
    """The layers of each bucket, as DistributedDataParallel fills them."""
    entries = [Entry(4 * layer.elements, "float32") for layer in model.layers]
    return assign(entries, list(reversed(range(len(entries)))), caps)


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
    ends, now = [0.0] * len(model.layers), model.forward * dilation
    for at in reversed(range(len(model.layers))):
        now += model.backward[at] * dilation
        ends[at] = now
    buckets = buckets_of(model, caps)
    ready = [max(ends[at] for at in layers) for layers in buckets]
    sizes = [sum(4 * model.layers[at].elements for at in layers) for layers in buckets]
    if seconds_of is None:
        hosts = network.hosts
        jobs = [
            _job(name, hosts, nbytes, costs, [when] * (hosts - 1) + [when * slowness])
            for nbytes, when in zip(sizes, ready, strict=True)
        ]
        _, times = _simulated(jobs, costs, network)
        now *= slowness
    else:
        times, free = [], 0.0
        for nbytes, when in zip(sizes, ready, strict=True):
            began = max(free, when)
            free = began + seconds_of(nbytes)
            times.append((began, free))
    over = max(now, times[-1][1])
    return Step(over, over - now, ready, times)


def linear(name: str, group: Group, topology: Topology, small: int, large: int) -> Callable[[int], float]:
    """The seconds of an all-reduce of any size, from those of two: with links of α and β the time of a schedule on one
    critical path is a straight line in the bytes."""
    entry = lookup("all_reduce", name)

    def simulated(nbytes: int) -> float:
        job = Job(entry.steps(group), share_bounds(nbytes, entry.units(group)), [0.0] * group.size)
        return simulate_jobs(group.size, [job], topology.link, topology.gamma)[0].seconds

    low, high = simulated(small), simulated(large)
    slope = (high - low) / (large - small)
    return lambda nbytes: low + slope * (nbytes - small)
