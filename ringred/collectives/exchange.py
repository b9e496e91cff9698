"""Collectives that only move data between pairs of ranks: gather, scatter, all-to-all, and a send with its receive."""

from __future__ import annotations

from ringred.collectives.registry import algorithm
from ringred.schedule.ir import Group, Recv, Send, Steps, unit

__all__: list[str] = []


def _after(rank: int, group: Group) -> list[int]:
    return [(rank + distance) % group.size for distance in range(1, group.size)]


def _before(rank: int, group: Group) -> list[int]:
    return [(rank - distance) % group.size for distance in range(1, group.size)]


@algorithm("gather", "direct")
def gather(rank: int, group: Group) -> Steps:
    """Every rank sends its share to the root."""
    if rank != group.root:
        yield (Send(group.root, unit(rank)),)
    elif group.size > 1:
        yield tuple(Recv(peer, unit(peer)) for peer in _after(rank, group))


@algorithm("scatter", "direct")
def scatter(rank: int, group: Group) -> Steps:
    """The root sends every rank its share."""
    if rank != group.root:
        yield (Recv(group.root, unit(rank)),)
    elif group.size > 1:
        yield tuple(Send(peer, unit(peer)) for peer in _after(rank, group))


@algorithm("all_to_all", "direct", units=lambda group: group.size**2)
def all_to_all(rank: int, group: Group) -> Steps:
    """Unit sender·P + receiver moves from sender to receiver, all in one round."""
    if group.size > 1:
        sends = [Send(peer, unit(rank * group.size + peer)) for peer in _after(rank, group)]
        yield (*sends, *(Recv(peer, unit(peer * group.size + rank)) for peer in _before(rank, group)))


@algorithm("send_recv", "direct", units=lambda group: 1)
def send_recv(rank: int, group: Group) -> Steps:
    """On two ranks: the root sends, the other receives."""
    if group.size == 2:
        yield (Send(1 - rank, unit(0)),) if rank == group.root else (Recv(1 - rank, unit(0)),)
