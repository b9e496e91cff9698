"""What a round of push and pull is predicted to cost, flat and by host, from the cost model that chooses algorithms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ringred.collectives.registry import lookup
from ringred.runtime.select import predict
from ringred.topology.model import Topology

__all__ = ["cheaper", "price"]


def price(nbytes: int, hosts: Sequence[int], shards: int, topology: Topology, *, by_host: bool) -> float:
    """Predicted seconds in which all ranks, rank r on host `hosts[r]`, push and pull `nbytes` bytes each to `shards`
    servers, which the first ranks host.

    A host's network card sends and receives at the same time, at β of the links between hosts, and the busiest card
    is waited for (as in the LogGP model: Alexandrov et al., SPAA 1995). Inside a host messages cost that link's α and
    β. The ranks of a host that are one worker reduce-scatter before, and all-gather after.
    """
    inside, between = topology.distance[0], topology.distance[-1]
    ranks_of, shards_of = Counter(hosts), Counter(hosts[:shards])
    together = max(ranks_of.values()) if by_host else 1
    worst = 0.0
    for host, ranks in ranks_of.items():
        workers = ranks / together
        elsewhere = sum(ranks_of.values()) / together - workers
        # A push sends from here to the servers of other hosts; a pull, from the servers here to the others' workers.
        out = workers * nbytes * (shards - shards_of[host]) / shards
        served = elsewhere * nbytes * shards_of[host] / shards
        near = workers * nbytes * shards_of[host] / shards
        messages = workers * shards
        push = messages * between[0] + max(out, served) * between[1]
        fold = (elsewhere + workers) * nbytes * shards_of[host] / shards * topology.gamma
        worst = max(worst, 2 * push + 2 * near * inside[1] + fold)
    if together == 1:
        return worst
    return worst + sum(_inside(name, together, nbytes, topology) for name in ("reduce_scatter", "all_gather"))


def _inside(collective: str, ranks: int, nbytes: int, topology: Topology) -> float:
    entry = lookup(collective, "direct")
    near = Topology(ranks, topology.distance[:1], topology.gamma, tuple((rank,) for rank in range(ranks)), "host")
    return predict(entry, entry.group(ranks), nbytes, near).seconds


def cheaper(nbytes: int, hosts: Sequence[int], shards: int, topology: Topology) -> bool:
    """Whether the ranks of a host had better be one worker."""
    if len(set(Counter(hosts).values())) > 1 or len(set(hosts)) == len(hosts):
        return False
    flat, by_host = (price(nbytes, hosts, shards, topology, by_host=which) for which in (False, True))
    return by_host < flat
