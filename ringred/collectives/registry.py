"""The table of algorithms. A file registers its algorithms with `@algorithm`; nothing else is needed to verify, test,
simulate, draw, benchmark and select them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ringred.errors import GridError, UnknownAlgorithm, nearest
from ringred.schedule.ir import Group, Spec, Step, Steps
from ringred.schedule.verify import Proof, verify
from ringred.topology.torus import check_grid, factorisations, near_square

__all__ = [
    "COLLECTIVES",
    "ROOTED",
    "Algorithm",
    "algorithm",
    "algorithms",
    "groups",
    "lookup",
    "prove",
    "register_native",
    "spec_of",
]

Schedule: TypeAlias = Callable[[int, Group], Steps]

COLLECTIVES = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "barrier",
    "send_recv",
)
ROOTED = frozenset({"broadcast", "reduce", "gather", "scatter"})


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to do one collective.

    `schedule(rank, group)` yields the rank's steps; None for a native one, which the transport does itself.
    `units(group)` is the number of units the buffer is divided into. `home(group)` gives, for each unit, the rank
    whose share it is in, if units belong to ranks (reduce-scatter, all-gather). `grids(size)` lists the grids that
    the algorithm takes, the default first; None if it takes none. `segmented`: it pipelines by itself, and
    `Group.segments` says in how many parts. `rank_order`: each unit is added up by one rank, in one fold in rank
    order, so that the bits of a sum depend neither on its size nor on how it is cut.
    """

    collective: str
    name: str
    summary: str
    schedule: Schedule | None
    units: Callable[[Group], int]
    home: Callable[[Group], tuple[int, ...]]
    grids: Callable[[int], tuple[tuple[int, ...], ...]] | None
    segmented: bool
    rank_order: bool

    @property
    def native(self) -> bool:
        return self.schedule is None

    def group(self, size: int, root: int = 0, grid: tuple[int, ...] | None = None, segments: int = 1) -> Group:
        """The group to run the algorithm on: `grid` is checked, None means the default grid. Raises `GridError`."""
        if not self.segmented:
            segments = 1
        if self.grids is None:
            if grid is not None:
                raise GridError(f"{self.collective} by {self.name!r} takes no grid, got {grid}")
        elif grid is None:
            grid = self.grids(size)[0]
        else:
            grid = tuple(grid)
            check_grid(grid, size)
        return Group(size, root, grid, segments)

    def steps(self, group: Group) -> Callable[[int], list[Step]]:
        """The schedule on `group`, as a function of the rank."""
        schedule = self.schedule
        if schedule is None:
            raise UnknownAlgorithm(f"{self.collective} by {self.name!r} is native: it has no schedule")
        return lambda rank: list(schedule(rank, group))


_REGISTRY: dict[str, dict[str, Algorithm]] = {collective: {} for collective in COLLECTIVES}


def _identity(group: Group) -> tuple[int, ...]:
    return tuple(range(group.size))


def _all_grids(size: int) -> tuple[tuple[int, ...], ...]:
    default = near_square(size)
    return (default, *(grid for grid in factorisations(size) if grid != default))


def algorithm(
    collective: str,
    name: str,
    *,
    units: Callable[[Group], int] = lambda group: group.size,
    home: Callable[[Group], tuple[int, ...]] = _identity,
    grid: bool = False,
    segmented: bool = False,
    rank_order: bool = False,
) -> Callable[[Schedule], Schedule]:
    """Registers the decorated schedule as the algorithm `name` of `collective`."""

    def register(schedule: Schedule) -> Schedule:
        summary = next(iter((schedule.__doc__ or "").strip().splitlines()), "")
        grids = _all_grids if grid else None
        _add(Algorithm(collective, name, summary, schedule, units, home, grids, segmented, rank_order))
        return schedule

    return register


def register_native(collective: str, name: str, summary: str) -> None:
    """Registers an algorithm that a transport does by itself: selectable and benchmarked, not verified."""
    _add(Algorithm(collective, name, summary, None, lambda group: 1, _identity, None, False, False))


def _add(entry: Algorithm) -> None:
    table = _REGISTRY[entry.collective]
    if entry.name in table:
        raise ValueError(f"{entry.collective} by {entry.name!r} is registered already")
    table[entry.name] = entry


@lru_cache(maxsize=1)
def _load() -> None:
    package = importlib.import_module("ringred.collectives")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def algorithms(collective: str) -> dict[str, Algorithm]:
    """The algorithms of `collective` by name."""
    _load()
    if collective not in _REGISTRY:
        raise UnknownAlgorithm(f"no collective {collective!r}; there are {', '.join(COLLECTIVES)}")
    return dict(_REGISTRY[collective])


def lookup(collective: str, name: str) -> Algorithm:
    """The algorithm `name` of `collective`. Raises `UnknownAlgorithm`, with the names there are."""
    table = algorithms(collective)
    if name not in table:
        raise UnknownAlgorithm(
            f"{collective}: no algorithm {name!r}{nearest(name, table)}; there are {', '.join(sorted(table))}"
        )
    return table[name]


def groups(entry: Algorithm, size: int) -> Iterator[Group]:
    """The groups of `size` ranks to prove `entry` on: every grid, two roots and two numbers of segments."""
    if entry.native or (entry.collective == "send_recv" and size != 2):
        return
    roots = (0, size - 1) if entry.collective in ROOTED and size > 1 else (0,)
    for grid in entry.grids(size) if entry.grids else (None,):
        for root in roots:
            for segments in (1, 3) if entry.segmented else (1,):
                yield Group(size, root, grid, segments)


def spec_of(entry: Algorithm, group: Group) -> Spec:
    """What `entry.collective` must do on `group`, in the units of `entry`."""
    size, root = group.size, group.root
    units = entry.units(group)
    everyone, every_unit, nothing = frozenset(range(size)), frozenset(range(units)), frozenset[int]()
    at_root = tuple(every_unit if rank == root else nothing for rank in range(size))
    everywhere = (every_unit,) * size
    collective = entry.collective
    if collective in ("all_reduce", "barrier"):
        return Spec(collective, size, units, (everyone,) * units, everywhere)
    if collective == "reduce":
        return Spec(collective, size, units, (everyone,) * units, at_root)
    if collective in ("broadcast", "send_recv"):
        return Spec(collective, size, units, (frozenset({root}),) * units, everywhere)
    if collective == "all_to_all":
        sources = tuple(frozenset({pair // size}) for pair in range(units))
        wants = tuple(frozenset(sender * size + rank for sender in range(size)) for rank in range(size))
        return Spec(collective, size, units, sources, wants)
    owners = entry.home(group)
    owned = tuple(frozenset(u for u in range(units) if owners[u] == rank) for rank in range(size))
    if collective == "reduce_scatter":
        return Spec(collective, size, units, (everyone,) * units, owned)
    if collective == "scatter":
        return Spec(collective, size, units, (frozenset({root}),) * units, owned)
    sources = tuple(frozenset({owner}) for owner in owners)
    return Spec(collective, size, units, sources, everywhere if collective == "all_gather" else at_root)


@lru_cache(maxsize=256)
def prove(entry: Algorithm, group: Group, puts: bool = False) -> Proof:
    """Verifies `entry` on `group`; the proof is cached."""
    return verify(spec_of(entry, group), entry.steps(group), puts=puts)
