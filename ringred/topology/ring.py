"""Coordinates on a ring of ranks."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["neighbours"]


def neighbours(members: Sequence[int], rank: int) -> tuple[int, int, int]:
    """(position, left, right) of `rank` on the ring `members`: it receives from left and sends to right."""
    position = members.index(rank)
    return position, members[position - 1], members[(position + 1) % len(members)]
