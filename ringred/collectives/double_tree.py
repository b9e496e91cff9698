"""The double binary tree: two trees, each with half of the data, inner ranks of one the leaves of the other.

Sanders, Speck and Träff, Two-tree algorithms for full bandwidth broadcast, reduction and scan (2009). The two
trees take turns, segment by segment: were a rank to wait for all of one half before the other, the second tree
would stand idle. Nobody waits for what a leaf receives, and a leaf waits for nobody when it sends. So a rank's
leaf half runs a tree's depth ahead of its inner half on the way up, and as far behind it on the way down. In
lockstep each segment would cost the way through both trees, and nothing would be gained by segments at all.
"""

from __future__ import annotations

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Chunk, Group, Recv, Send, Steps, unit
from ringred.topology.tree import Place, double_binary

__all__: list[str] = []


@algorithm("all_reduce", "double_tree", units=lambda group: 2 * group.segments, segmented=True)
def all_reduce(rank: int, group: Group) -> Steps:
    """Both halves up their trees at once, then down: ≈ 2log2P·α + 2Nβ + Nγ once segments fill the pipeline."""
    for place, chunk in _turns(rank, group, leaf_lag=-group.size.bit_length()):
        if place.children:
            yield tuple(Recv(child, chunk, reduce=True) for child in place.children)
        if place.parent is not None:
            yield (Send(place.parent, chunk),)
    for place, chunk in _turns(rank, group, leaf_lag=group.size.bit_length()):
        if place.parent is not None:
            yield (Recv(place.parent, chunk),)
        if place.children:
            yield tuple(Send(child, chunk) for child in place.children)


def _turns(rank: int, group: Group, leaf_lag: int) -> list[tuple[Place, Chunk]]:
    """The segments of both halves in turn, those of a tree in which the rank is a leaf `leaf_lag` later."""
    turns = []
    for half, tree in enumerate(double_binary(group.size)):
        place = tree[rank]
        for segment in range(group.segments):
            at = segment + (0 if place.children else leaf_lag)
            turns.append((at, half, place, unit(half * group.segments + segment)))
    turns.sort(key=lambda turn: turn[:2])
    return [(place, chunk) for _, _, place, chunk in turns]
