"""Published formulas to compare schedules with: messages, amount of data and time of an all-reduce.

Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in MPICH (2005), for ring,
halving-doubling and trees; Mikami et al. (arXiv 1811.05233) for the torus; the others follow from counting.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from ringred.schedule.ir import Group

__all__ = ["ClosedForm", "all_reduce", "pipelined_chain"]


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """Messages and multiple of the data size that the busiest rank sends, and the total time in seconds."""

    messages: int
    data_sent: float
    seconds: float


def all_reduce(
    name: str, group: Group, nbytes: float, links: tuple[tuple[float, float], ...], gamma: float
) -> ClosedForm | None:
    """The formula of the all-reduce `name`, or None if no formula is known for this group.

    `links[d]` holds α and β along dimension d of the grid; without a grid only the first is used.
    """
    size = group.size
    alpha, beta = links[0]
    share = (size - 1) / size
    power = size & (size - 1) == 0
    rounds = int(log2(size)) if power else 0
    if name == "ring":
        messages = 2 * (size - 1)
        return ClosedForm(messages, 2 * share, messages * alpha + 2 * share * nbytes * beta + share * nbytes * gamma)
    if name == "torus" and group.grid is not None:
        return _torus(group.grid, nbytes, links, gamma)
    if name == "halving_doubling" and power:
        seconds = 2 * rounds * alpha + 2 * share * nbytes * beta + share * nbytes * gamma
        return ClosedForm(2 * rounds, 2 * share, seconds)
    if name == "tree" and power:
        seconds = 2 * rounds * (alpha + nbytes * beta) + rounds * nbytes * gamma
        return ClosedForm(rounds, float(rounds), seconds)
    if name == "direct":
        # All messages of a rank share its port, and the owner adds P − 1 shares.
        messages = 2 * (size - 1)
        seconds = messages * alpha + 2 * share * nbytes * beta + share * nbytes * gamma
        return ClosedForm(messages, 2 * share, seconds)
    if name == "central":
        others = size - 1
        seconds = 2 * others * (alpha + nbytes * beta) + others * nbytes * gamma
        return ClosedForm(others, float(others), seconds)
    return None


def _torus(grid: tuple[int, ...], nbytes: float, links: tuple[tuple[float, float], ...], gamma: float) -> ClosedForm:
    messages, data, seconds, shard = 0, 0.0, 0.0, 1.0
    for dimension, extent in enumerate(grid):
        alpha, beta = links[min(dimension, len(links) - 1)]
        moved = (extent - 1) / extent * shard
        messages += 2 * (extent - 1)
        data += 2 * moved
        seconds += 2 * (extent - 1) * alpha + moved * nbytes * (2 * beta + gamma)
        shard /= extent
    return ClosedForm(messages, data, seconds)


def pipelined_chain(size: int, nbytes: float, segments: int, link: tuple[float, float]) -> float:
    """Seconds of a broadcast along a chain in `segments` segments: (P − 2 + k)(α + βN/k)."""
    alpha, beta = link
    return (size - 2 + segments) * (alpha + beta * nbytes / segments) if size > 1 else 0.0
