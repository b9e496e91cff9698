"""Two levels: within a host every rank sends to every other; between hosts each shard is all-reduced on a ring.

The grid is (ranks on a host, hosts), X inside the host. Each rank sends only 1/X of the data between hosts; a single
leader for each host would send all of it.
"""

from __future__ import annotations

from ringred.collectives.direct import all_gather_among, reduce_scatter_among
from ringred.collectives.registry import algorithm
from ringred.collectives.ring import all_gather_on, reduce_scatter_on
from ringred.collectives.torus import shards
from ringred.schedule.ir import Group, Steps

__all__: list[str] = []


@algorithm("all_reduce", "hierarchical", grid=True)
def all_reduce(rank: int, group: Group) -> Steps:
    """Direct reduce-scatter on the host, ring all-reduce between hosts, direct all-gather on the host."""
    assert group.grid is not None, "the registry gives every hierarchy its grid"
    (host, host_chunks), *between = shards(rank, group.grid)
    yield from reduce_scatter_among(host, rank, host_chunks)
    for members, chunks in between:
        yield from reduce_scatter_on(members, rank, chunks)
    for members, chunks in reversed(between):
        yield from all_gather_on(members, rank, chunks)
    yield from all_gather_among(host, rank, host_chunks)
