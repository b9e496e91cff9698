"""Coordinates on a torus of any number of dimensions, X innermost: rank = x + X·(y + Y·(z + ...))."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ringred.errors import GridError

__all__ = ["check_grid", "coordinates", "factorisations", "line", "near_square"]


def coordinates(rank: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The coordinates (x, y, ...) of `rank`."""
    place = []
    for extent in grid:
        rank, coordinate = divmod(rank, extent)
        place.append(coordinate)
    return tuple(place)


def line(rank: int, grid: tuple[int, ...], dimension: int) -> list[int]:
    """The ranks on the line through `rank` along `dimension`, by coordinate: dimension 0 gives the row."""
    stride = math.prod(grid[:dimension])
    first = rank - coordinates(rank, grid)[dimension] * stride
    return [first + index * stride for index in range(grid[dimension])]


def near_square(size: int) -> tuple[int, int]:
    """The grid (X, Y) with X·Y = size and X ≥ Y as close as they can be; a prime gives (size, 1)."""
    rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)
    return size // rows, rows


def factorisations(size: int) -> Iterator[tuple[int, ...]]:
    """Every grid of `size` ranks with at least two dimensions of at least 2, and (size, 1)."""
    yield size, 1
    yield from (grid for grid in _splits(size) if len(grid) > 1)


def _splits(size: int) -> Iterator[tuple[int, ...]]:
    if size > 1:
        yield (size,)
    for first in range(2, size // 2 + 1):
        if size % first == 0:
            yield from ((first, *rest) for rest in _splits(size // first))


def check_grid(grid: tuple[int, ...], size: int) -> None:
    """Raises `GridError` unless `grid` holds exactly `size` ranks."""
    shape = "x".join(map(str, grid))
    if not grid or any(extent < 1 for extent in grid):
        raise GridError(f"grid {shape or '()'}: expected positive extents such as (4, 3)")
    if math.prod(grid) != size:
        raise GridError(f"grid {shape} holds {math.prod(grid)} ranks, expected {size}")
