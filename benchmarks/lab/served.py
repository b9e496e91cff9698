"""What a mini-batch on parameter servers is predicted to take: pushes and pulls as schedules on the simulator's links.

A push to a shard on each rank is a direct reduce-scatter, a pull from them an all-gather; where the ranks of a host are
one worker, both are those of a grid (ranks on a host, hosts). To one server all send, and it sends to all.
"""

from __future__ import annotations

from dataclasses import replace

from lab.network import Network
from lab.predict import Costs, Step, filled, job_of, simulated
from lab.profiles import Profile
from ringred.collectives.registry import lookup
from ringred.parameter_server.policies import parse
from ringred.parameter_server.policies.policy import FirstK
from ringred.runtime.select import share_bounds
from ringred.schedule.cost import Job

__all__ = ["in_turns", "round_of", "served_seconds"]

_PARTS = (1 << 20,)  # gradients are pushed when as many bytes are there


def served_seconds(
    way: str, model: Profile, dilation: float, costs: Costs, network: Network, slowness: float = 1.0
) -> float:
    """The seconds in which all workers together finish a mini-batch each that counts; the last host computes `slowness`
    times as long. `way` is that of a `Case`, its policy one of `FirstK`.

    Workers that wait for all others, or whose mini-batches an update cancels, take turns: compute and push, and pull
    once it is made. Of those that do not, each takes its own time, or the busiest port all that passes it, or the
    thread of a server, or the processors, where the hosts share some, all that is encrypted and decrypted. One beside
    the only server passes no port: it computes all the time. K-async, where K workers wait for each other, is
    predicted as if nobody waited.
    """
    kind, _, name = way.partition(":")
    policy = parse(name)
    assert isinstance(policy, FirstK), f"{policy} is not predicted"
    workers = network.hosts if kind == "hosts" else network.ranks
    several = policy.gradients_per_update(workers)
    if in_turns(policy, workers):
        last = slowness if several == workers else 1.0
        return round_of(kind, model, dilation, costs, network, last).seconds * workers / several
    alone = Network(2, network.mbit) if kind == "server" else network  # one that nobody else is in the way of
    usual, slow = (round_of(kind, model, dilation * times, costs, alone).seconds for times in (1.0, slowness))
    beside = network.each if kind == "server" else 0
    late = workers // network.hosts  # those of the last host
    away = workers - beside
    own = away / ((away - late) / usual + late / slow)
    port = _port_bytes(kind, model.nbytes, network)
    # One server sees all of it, in both directions; of one on each host a server sees half of what its host does.
    thread, everywhere = (2 * port, 2 * port) if kind == "server" else (port, network.hosts * port)
    copy = _sealed(costs).copy
    crowded = 2 * copy * everywhere / costs.cores if costs.cores else 0.0
    seconds = max(own, costs.beta * port, copy * thread, crowded)
    return workers / (away / seconds + (beside / (model.seconds * dilation) if beside else 0.0))


def in_turns(policy: FirstK, workers: int) -> bool:
    """Whether all workers begin a mini-batch with each update, or could: those that do not are cancelled."""
    return policy.others_cancelled or (policy.finisher_waits and policy.gradients_per_update(workers) == workers)


def round_of(kind: str, model: Profile, dilation: float, costs: Costs, network: Network, last: float = 1.0) -> Step:
    """A mini-batch of all workers on servers of a `kind` ("server", "servers", "hosts"): pushes, and at last the pull;
    the last host computes `last` times as long. Bytes between hosts are encrypted."""
    costs = _sealed(costs)
    sizes, ready = filled(model, dilation, _PARTS)
    if kind == "hosts" and network.each > 1:  # pushed once backward is over
        sizes, ready = [model.nbytes], [model.seconds * dilation]
    jobs = [
        _job(kind, "push", nbytes, network.times(when, last), costs, network)
        for nbytes, when in zip(sizes, ready, strict=True)
    ]
    jobs.append(_job(kind, "pull", model.nbytes, [0.0] * network.ranks, costs, network))
    seconds, times = simulated(jobs, costs, network)
    return Step(seconds, seconds - model.seconds * dilation * last, ready, times)


def _sealed(costs: Costs) -> Costs:
    """The same where what is copied is encrypted."""
    return replace(costs, copy=max(costs.copy, costs.cipher))


def _job(kind: str, what: str, nbytes: int, ready: list[float], costs: Costs, network: Network) -> Job:
    if kind == "server":
        entry = lookup("all_reduce", "central")
        steps = entry.steps(entry.group(network.ranks))
        half = slice(0, 1) if what == "push" else slice(1, 2)
        return job_of(lambda rank: tuple(steps(rank))[half], [(0, nbytes)], ready, costs)
    by_host = kind == "hosts" and network.each > 1
    entry = lookup("reduce_scatter" if what == "push" else "all_gather", "torus" if by_host else "direct")
    group = entry.group(network.ranks, grid=(network.each, network.hosts) if by_host else None)
    return job_of(entry.steps(group), share_bounds(nbytes, entry.units(group)), ready, costs)


def _port_bytes(kind: str, nbytes: int, network: Network) -> float:
    """What the busiest host sends, and receives, while each worker does one mini-batch."""
    if kind == "server":
        return (network.ranks - network.each) * nbytes
    together = network.each if kind == "servers" else 1
    return 2 * together * nbytes * (network.hosts - 1) / network.hosts
