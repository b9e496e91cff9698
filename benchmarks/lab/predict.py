"""What the simulator says of the laboratory's cases, from costs that were measured between its hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.hosts import Network
from lab.profiles import Profile
from ringred.buckets import FIRST_BUCKET_BYTES, MIB, Entry, assign
from ringred.collectives.registry import lookup
from ringred.runtime.select import candidates, segments_for, share_bounds
from ringred.schedule.cost import Job, Ports, simulate_jobs
from ringred.schedule.ir import Group
from ringred.topology.model import Topology

__all__ = ["Costs", "Step", "all_reduce_seconds", "buckets_of", "busbw", "linear", "step_of", "uplinks"]

_CAPS = (FIRST_BUCKET_BYTES, 25 * MIB)


@dataclass(frozen=True)
class Costs:
    """α, β, γ, λ between two hosts, and what a call takes beside, in seconds; the greatest message in bytes."""

    alpha: float
    beta: float
    gamma: float
    latency: float
    call: float
    segment: int

    def topology(self, size: int) -> Topology:
        """Ranks with these links between all of them."""
        places = tuple((rank,) for rank in range(size))
        return Topology(size, ((self.alpha, self.beta, self.latency),), self.gamma, places, "lab", self.call)


@dataclass(frozen=True)
class Step:
    """A predicted step: its seconds, and those of its reductions after backward."""

    seconds: float
    exposed: float
    ready: Sequence[float]
    times: Sequence[tuple[float, float]]


def _group(name: str, size: int, nbytes: int, costs: Costs) -> tuple[str, Group]:
    """The algorithm, which "auto" chooses by the costs, and its group."""
    if name == "auto":
        best = candidates("all_reduce", size, nbytes, costs.topology(size), segment_bytes=costs.segment)[0]
        entry = lookup("all_reduce", best.name)
        return best.name, entry.group(size, grid=best.grid, segments=segments_for(nbytes, costs.segment))
    return name, lookup("all_reduce", name).group(size, segments=segments_for(nbytes, costs.segment))


def _job(name: str, size: int, nbytes: int, costs: Costs, ready: Sequence[float]) -> Job:
    name, group = _group(name, size, nbytes, costs)
    entry = lookup("all_reduce", name)
    segment = costs.segment if size <= 16 and nbytes > costs.segment else None
    return Job(entry.steps(group), share_bounds(nbytes, entry.units(group)), ready, segment)


def uplinks(network: Network, costs: Costs) -> Ports | None:
    """The ports on the ways of a network with racks; None without."""
    if network.racks == 1:
        return None
    slower = costs.beta * network.mbit / network.uplink_mbit

    def ports(sender: int, receiver: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        out, into = [(sender, costs.beta)], [(1000 + receiver, costs.beta)]
        here, there = network.rack_of(sender), network.rack_of(receiver)
        if here != there:
            out.append((2000 + here, slower))
            into.insert(0, (3000 + there, slower))
        return out, into

    return ports


def all_reduce_seconds(name: str, size: int, nbytes: int, costs: Costs, ports: Ports | None = None) -> float:
    """The time of an all-reduce among hosts."""
    job = _job(name, size, nbytes, costs, [0.0] * size)
    cost, _ = simulate_jobs(size, [job], costs.topology(size).link, costs.gamma, ports=ports, call=costs.call)
    return cost.seconds


def buckets_of(model: Profile, caps: Sequence[int] = _CAPS) -> list[list[int]]:
    """The layers of each bucket, as DistributedDataParallel fills them."""
    entries = [Entry(4 * layer.elements, "float32") for layer in model.layers]
    return assign(entries, list(reversed(range(len(entries)))), caps)


def step_of(
    model: Profile,
    dilation: float,
    name: str,
    size: int,
    costs: Costs,
    *,
    ports: Ports | None = None,
    caps: Sequence[int] = _CAPS,
    seconds_of: Callable[[int], float] | None = None,
) -> Step:
    """A training step on `size` hosts, each bucket reduced as soon as it is full and those before it are done.

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
        jobs = [_job(name, size, nbytes, costs, [when] * size) for nbytes, when in zip(sizes, ready, strict=True)]
        _, times = simulate_jobs(size, jobs, costs.topology(size).link, costs.gamma, ports=ports, call=costs.call)
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


def busbw(size: int, nbytes: int, seconds: float) -> float:
    """Bus bandwidth of an all-reduce in bytes a second, as nccl-tests defines it."""
    return nbytes * 2 * (size - 1) / size / seconds
