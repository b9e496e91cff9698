"""The pipelined chain: the root sends to the next rank, which forwards each segment as it comes."""

from __future__ import annotations

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Group, Recv, Send, Steps, unit

__all__: list[str] = []


@algorithm("broadcast", "chain", units=lambda group: 1)
def broadcast(rank: int, group: Group) -> Steps:
    """Along the chain in k segments: (P−2+k)(α + βN/k)."""
    position = (rank - group.root) % group.size
    if position > 0:
        yield (Recv((rank - 1) % group.size, unit(0)),)
    if position < group.size - 1:
        yield (Send((rank + 1) % group.size, unit(0)),)
