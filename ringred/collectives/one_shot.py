"""One round for small messages: every rank sends all its data to all others, and each adds it in rank order."""

from __future__ import annotations

from ringred.collectives.direct import reduce_scatter_among
from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Group, Steps, unit

__all__: list[str] = []


@algorithm("all_reduce", "one_shot", units=lambda group: 1, rank_order=True)
def all_reduce(rank: int, group: Group) -> Steps:
    """One round of P − 1 messages of the whole data: α-optimal where all messages are in flight together."""
    yield from reduce_scatter_among(range(group.size), rank, [unit(0)] * group.size)
