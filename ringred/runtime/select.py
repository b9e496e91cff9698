"""Chooses an algorithm by predicted cost. Every rank makes the same choice, because all use the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ringred.collectives.registry import Algorithm, algorithms, lookup
from ringred.errors import UnknownAlgorithm
from ringred.schedule.cost import Cost, simulate
from ringred.schedule.ir import Group
from ringred.topology.calibrate import SHORT_BYTES, Costs, Tuning
from ringred.topology.detect import local_grid
from ringred.topology.model import Topology, hosts

__all__ = [
    "AUTOMATIC",
    "CROWDED",
    "RANK_ORDER",
    "Candidate",
    "candidates",
    "choose",
    "costs_of",
    "decided_as",
    "machine_model",
    "predict",
    "segments_for",
    "share_bounds",
]

# Costs used if nothing was measured, by transport and memory; rounded from the table in docs/design/selection.md. They
# only need to be right relative to each other, and the same on all ranks.
_BUILT_IN: dict[str, Tuning] = {
    "local": {"tensor": (20e-6, 0.1e-9, 0.1e-9, 0.0, 0.0)},
    "shm": {"tensor": (0.7e-6, 0.05e-9, 0.04e-9, 0.7e-6, 3e-6), "window": (0.1e-6, 0.01e-9, 0.05e-9, 0.1e-6, 4e-6)},
    "mpi": {"tensor": (3e-6, 0.2e-9, 0.1e-9, 0.0, 0.0)},
    "cuda_ipc": {"tensor": (9e-6, 3e-12, 1e-12, 6e-6, 30e-6), "window": (6e-6, 2e-12, 1e-12, 6e-6, 30e-6)},
    "torch_p2p": {"tensor": (60e-6, 0.5e-9, 0.1e-9, 0.0, 0.0)},
}
_BETWEEN_HOSTS = (80e-6, 8e-9, 0.0, 0.0, 0.0)  # TCP on 1 Gbit/s
CROWDED = 1.5
"""Where several hosts send to one at once, a byte takes so many times as long; where a rank turns from one of them to
another, the mean of that and of once (docs/design/selection.md)."""

RANK_ORDER = "rank_order"
"""Like "auto", but only among the algorithms that add every element in rank order."""
AUTOMATIC = frozenset({"auto", RANK_ORDER})

# Many ranks mean many messages to simulate; with more ranks than this, only algorithms whose number of messages grows
# slowly with P are considered.
_MANY_RANKS = 64
_FEW_RANKS = 4  # up to this number, simulating every segment takes at most 0.1 s
_SCALABLE = frozenset({"tree", "double_tree", "halving_doubling", "torus", "hierarchical", "chain"})


def share_bounds(count: int, units: int) -> list[tuple[int, int]]:
    """The bounds of each share when `count` elements are divided into `units` shares as equal as possible."""
    return [(index * count // units, (index + 1) * count // units) for index in range(units)]


def segments_for(nbytes: int, segment_bytes: int) -> int:
    """The number of segments, at most 64, into which a tree that pipelines by itself divides `nbytes` bytes."""
    return max(1, min(64, -(-nbytes // (2 * segment_bytes))))


def machine_model(
    transport: str, host_of_rank: tuple[int, ...], tuning: Tuning | None = None, memory: str = "tensor"
) -> Topology:
    """The cost model for choosing algorithms: links within a host for tensors in `memory` (a kind of `costs_of`), and
    links between hosts.

    `transport` may name two, as in "shm+mpi": within a host and between hosts. `tuning` holds measured costs, if any.
    """
    near = transport.partition("+")[0]
    known = dict(_BUILT_IN.get(near, _BUILT_IN["torch_p2p"])) | dict(tuning or {})
    whole = known.get(memory.removeprefix("short "), known["tensor"])
    alpha, beta, gamma, latency, call = inside = known.get(memory, whole)
    far = inside if len(set(host_of_rank)) == 1 else known.get("between", _BETWEEN_HOSTS)
    between = far[0], far[1], far[3], CROWDED * far[1]
    return hosts(host_of_rank, (alpha, beta, latency), between, gamma, transport, call)


def costs_of(memory: str, nbytes: int) -> str:
    """The kind of costs of a collective on `nbytes` bytes in `memory`."""
    return f"short {memory}" if nbytes <= SHORT_BYTES else memory


def predict(entry: Algorithm, group: Group, nbytes: int, topology: Topology, segment_bytes: int | None = None) -> Cost:
    """The simulated cost of `entry` on `group` for `nbytes` bytes."""
    bounds = share_bounds(nbytes, entry.units(group))
    cost = simulate(group.size, entry.steps(group), bounds, topology.link, topology.gamma, segment=segment_bytes)
    return replace(cost, seconds=cost.seconds + topology.call)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An algorithm, its grid and its predicted time in seconds."""

    name: str
    grid: tuple[int, ...] | None
    seconds: float


def candidates(
    collective: str,
    size: int,
    nbytes: int,
    topology: Topology,
    *,
    root: int = 0,
    segment_bytes: int = 1 << 20,
    native: Costs | None = None,
    rank_order: bool = False,
) -> list[Candidate]:
    """Every algorithm that can do `collective`, the fastest first.

    `native` are the measured costs of the transport's own all-reduce, if that is a candidate. With `rank_order`, only
    algorithms that add every element in rank order.
    """
    host_grid = local_grid([place[-1] for place in topology.place]) if len(topology.distance) > 1 else None
    # A tree that divides its data into segments by itself must not look faster because of that: the executor divides
    # the data of every algorithm.
    cut = segment_bytes if size <= _FEW_RANKS and segments_for(nbytes, segment_bytes) > 1 else None
    found = []
    for entry in algorithms(collective).values():
        if rank_order and not entry.rank_order:
            continue
        if entry.native:
            if native is not None:
                found.append(Candidate(entry.name, None, native[0] + nbytes * native[1]))
            continue
        if size > _MANY_RANKS and entry.name not in _SCALABLE and not rank_order and len(algorithms(collective)) > 1:
            continue
        grid = host_grid if entry.grids else None
        group = entry.group(size, root, grid, segments_for(nbytes, segment_bytes))
        found.append(Candidate(entry.name, group.grid, predict(entry, group, nbytes, topology, cut).seconds))
    # Ties are broken by name, so that every rank chooses the same algorithm.
    return sorted(found, key=lambda candidate: (candidate.seconds, candidate.name))


def decided_as(nbytes: int) -> int:
    """The size used to choose an algorithm for `nbytes` bytes: `nbytes` rounded up to a power of two."""
    return 1 << max(nbytes - 1, 1).bit_length()


@lru_cache(maxsize=1024)
def _fastest(
    collective: str, size: int, nbytes: int, topology: Topology, root: int, native: Costs | None, rank_order: bool
) -> Candidate:
    return candidates(collective, size, nbytes, topology, root=root, native=native, rank_order=rank_order)[0]


def choose(
    collective: str,
    nbytes: int,
    topology: Topology,
    root: int = 0,
    native: Costs | None = None,
    rank_order: bool = False,
) -> tuple[Algorithm, Candidate]:
    """The algorithm for `nbytes` bytes, and its predicted cost; with `rank_order` one that adds in rank order."""
    table = algorithms(collective)
    if rank_order and not any(entry.rank_order for entry in table.values()):
        raise UnknownAlgorithm(f"{collective} has no algorithm that adds in rank order")
    if len(table) == 1:
        (entry,) = table.values()
        return entry, Candidate(entry.name, None, 0.0)
    best = _fastest(collective, topology.size, decided_as(nbytes), topology, root, native, rank_order)
    return lookup(collective, best.name), best
