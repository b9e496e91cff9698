"""A collective algorithm as data: what one rank sends and receives, step by step.

A buffer is divided into *units*, numbered from 0. A `Chunk` is a run of consecutive units. Each algorithm is
a pure generator of steps for one rank; a `Step` is a tuple of operations that may run together. Messages
between an ordered pair of ranks are matched first in, first out, by (step, operation); nothing else
synchronises ranks. A send uses the value from before its step. All reducing receives of one step into
the same chunk form one n-ary fold in rank order, which includes the local value at the place of the local rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

__all__ = [
    "Chunk",
    "Group",
    "Op",
    "Recv",
    "Send",
    "Spec",
    "Step",
    "Steps",
    "fold_groups",
    "is_final",
    "last_writes",
    "unit",
]


class Chunk(NamedTuple):
    """The units `start <= u < stop` of a buffer."""

    start: int
    stop: int

    @property
    def units(self) -> range:
        return range(self.start, self.stop)

    def overlaps(self, other: Chunk) -> bool:
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return str(self.start) if self.stop == self.start + 1 else f"{self.start}:{self.stop}"


def unit(index: int) -> Chunk:
    """The chunk of the one unit `index`."""
    return Chunk(index, index + 1)


class Send(NamedTuple):
    """Send `chunk`, as it was before this step, to rank `peer`."""

    peer: int
    chunk: Chunk


class Recv(NamedTuple):
    """Receive `chunk` from rank `peer`; combine it with the local chunk if `reduce`, else replace that."""

    peer: int
    chunk: Chunk
    reduce: bool = False


Op: TypeAlias = Send | Recv
Step: TypeAlias = tuple[Op, ...]
Steps: TypeAlias = Iterator[Step]


@dataclass(frozen=True, slots=True)
class Group:
    """Who takes part: `size` ranks, the `root` of a rooted collective, and the `grid` the ranks form.

    `grid` is (X, Y, ...), X innermost: rank = x + X·(y + Y·(...)); None where the algorithm needs none.
    `segments` is the number of parts into which an algorithm that pipelines by itself cuts the data.
    """

    size: int
    root: int = 0
    grid: tuple[int, ...] | None = None
    segments: int = 1

    def __str__(self) -> str:
        grid = "" if self.grid is None else f", grid {'x'.join(map(str, self.grid))}"
        root = f", root {self.root}" if self.root else ""
        segments = f", {self.segments} segments" if self.segments > 1 else ""
        return f"{self.size} rank{'s' if self.size != 1 else ''}{grid}{root}{segments}"


@dataclass(frozen=True, slots=True)
class Spec:
    """What a collective must do, independent of any algorithm.

    `sources[u]` are the ranks whose values make up unit `u`: one rank where data only moves, all ranks where
    it is reduced. Before the collective, each source holds its own contribution. After it, every rank `r` must hold
    the complete value of each unit in `wants[r]`.
    """

    collective: str
    size: int
    units: int
    sources: tuple[frozenset[int], ...]
    wants: tuple[frozenset[int], ...]


def fold_groups(step: Step) -> list[tuple[Chunk, bool, list[int]]]:
    """The receives of a step as (chunk, reduce, peers): reducing receives into the same chunk are one group.

    Peers of a fold are in rank order, the order in which they are added. Groups are in the order of their first
    operation.
    """
    groups: list[tuple[Chunk, bool, list[int]]] = []
    folds: dict[Chunk, list[int]] = {}
    for op in step:
        if isinstance(op, Send):
            continue
        if op.reduce and op.chunk in folds:
            folds[op.chunk].append(op.peer)
            continue
        peers = [op.peer]
        if op.reduce:
            folds[op.chunk] = peers
        groups.append((op.chunk, op.reduce, peers))
    for peers in folds.values():
        peers.sort()
    return groups


def last_writes(steps: Iterable[Step]) -> dict[int, int]:
    """The last step that receives into each unit."""
    return {
        u: index for index, step in enumerate(steps) for op in step if not isinstance(op, Send) for u in op.chunk.units
    }


def is_final(chunk: Chunk, step: int, last_write: Mapping[int, int], keep: Callable[[int], bool]) -> bool:
    """Whether a fold into `chunk` in `step` gives the complete value: the last write to units that must be kept.

    Such a fold also does the division of a mean. A rank decides this from its own steps alone; the verifier proves
    that the decision is right.
    """
    return all(last_write[u] == step and keep(u) for u in chunk.units)
