"""Asynchronous SGD: every gradient is an update. K-async with K = 1."""

from __future__ import annotations

from ringred.parameter_server.policies.k_async import KAsync

__all__ = ["Async"]


class Async(KAsync):
    """Nobody waits. Time per update E[X]/P, mean staleness P − 1.

    With exponential mini-batch times staleness is geometric: Pr(s = a) = (1/P)(1 − 1/P)^a.
    """

    name = "async"

    def __init__(self, *, elastic: bool = False) -> None:
        super().__init__(1, elastic=elastic)

    def __repr__(self) -> str:
        return f"Async({'elastic=True' if self.elastic else ''})"
