"""Two levels: everybody to everybody inside a host, a ring of the shards between hosts.

The grid is (ranks on a host, hosts), X inside the host. Only 1/X of the data crosses between hosts per rank; with
one leader a host it would be all of it.
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
