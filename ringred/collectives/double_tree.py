"""The double binary tree: two trees, each with half of the data; the inner ranks of one are leaves of the other.

Sanders, Speck and Träff, Two-tree algorithms for full bandwidth broadcast, reduction and scan (2009). The two
trees alternate, segment by segment: if a rank waited for all of one half before the other, the second tree would be
idle. No rank waits for the data that a leaf receives, and a leaf waits for no rank before it sends. So the half in
which a rank is a leaf runs ahead of its other half by the depth of a tree on the way up, and behind it by as much on
the way down. In lockstep each segment would take the time of both trees together, and segments would gain nothing.
"""

from __future__ import annotations

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Chunk, Group, Recv, Send, Steps, unit
from ringred.topology.tree import Place, double_binary

__all__: list[str] = []


@algorithm("all_reduce", "double_tree", units=lambda group: 2 * group.segments, segmented=True)
def all_reduce(rank: int, group: Group) -> Steps:
    """Both halves go up their trees at once, then down: ≈ 2log2P·α + 2Nβ + Nγ once segments fill the pipeline."""
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
    """The segments of both halves, alternating; where the rank is a leaf, they come `leaf_lag` turns later."""
    turns = []
    for half, tree in enumerate(double_binary(group.size)):
        place = tree[rank]
        for segment in range(group.segments):
            at = segment + (0 if place.children else leaf_lag)
            turns.append((at, half, place, unit(half * group.segments + segment)))
    turns.sort(key=lambda turn: turn[:2])
    return [(place, chunk) for _, _, place, chunk in turns]
