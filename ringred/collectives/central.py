"""The parameter-server pattern as a baseline: all ranks send to rank 0, which adds and sends the sum back."""

from __future__ import annotations

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Group, Recv, Send, Steps, unit

__all__: list[str] = []


@algorithm("all_reduce", "central", units=lambda group: 1, rank_order=True)
def all_reduce(rank: int, group: Group) -> Steps:
    """Rank 0 receives and sends (P−1)N bytes; rings were introduced to avoid this."""
    if rank:
        yield (Send(0, unit(0)),)
        yield (Recv(0, unit(0)),)
    elif group.size > 1:
        yield tuple(Recv(peer, unit(0), reduce=True) for peer in range(1, group.size))
        yield tuple(Send(peer, unit(0)) for peer in range(1, group.size))
