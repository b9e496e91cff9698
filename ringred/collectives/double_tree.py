"""The double binary tree: two trees, each with half of the data, inner ranks of one the leaves of the other.

Sanders, Speck and Träff, Two-tree algorithms for full bandwidth broadcast, reduction and scan (2009). The two
trees take turns segment by segment. That order is part of the schedule: were a rank to wait for all of one half
before the other, the second tree would stand idle, and cost 4Nβ instead of 2Nβ.
"""

from __future__ import annotations

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Chunk, Group, Recv, Send, Steps, unit
from ringred.topology.tree import double_binary

__all__: list[str] = []


@algorithm("all_reduce", "double_tree", units=lambda group: 2 * group.segments, segmented=True)
def all_reduce(rank: int, group: Group) -> Steps:
    """Both halves up their trees at once, then down: ≈ 2log2P·α + 2Nβ + Nγ once segments fill the pipeline."""
    places = [tree[rank] for tree in double_binary(group.size)]

    def chunk(half: int, segment: int) -> Chunk:
        return unit(half * group.segments + segment)

    turns = [(half, place, segment) for segment in range(group.segments) for half, place in enumerate(places)]
    from_leaf = [
        Send(place.parent, chunk(half, segment))
        for half, place, segment in turns
        if place.parent is not None and not place.children
    ]
    if from_leaf:
        yield tuple(from_leaf)
    for half, place, segment in turns:
        if place.children:
            yield tuple(Recv(child, chunk(half, segment), reduce=True) for child in place.children)
            if place.parent is not None:
                yield (Send(place.parent, chunk(half, segment)),)
    for half, place, segment in turns:
        if place.parent is not None:
            yield (Recv(place.parent, chunk(half, segment)),)
        if place.children:
            yield tuple(Send(child, chunk(half, segment)) for child in place.children)
