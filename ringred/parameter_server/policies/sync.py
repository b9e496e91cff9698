"""Synchronous SGD: all workers make an update. K-sync with K = P."""

from __future__ import annotations

from collections.abc import Iterable

from ringred.parameter_server.policies.k_sync import KSync
from ringred.parameter_server.policies.policy import Decision

__all__ = ["Sync"]


class Sync(KSync):
    """Waits for every worker: what an all-reduce computes. With exponential times an update takes H_P/μ.

    With `elastic`, an update waits for the workers that are there.
    """

    name = "sync"

    def __init__(self, *, elastic: bool = False) -> None:
        super().__init__(1, elastic=elastic)  # K is the number of workers, which `start` tells

    def start(self, workers: Iterable[int]) -> Decision:
        self.workers = set(workers)
        self.k = max(1, len(self.workers))
        return super().start(self.workers)

    def gradients_per_update(self, workers: int) -> int:
        return workers

    def joined(self, worker: int) -> Decision:
        decision = super().joined(worker)
        self.k = max(self.k, len(self.workers))
        return decision

    def __repr__(self) -> str:
        return f"Sync({'elastic=True' if self.elastic else ''})"
