"""n-softsync: an update for every ⌊P/n⌋ mini-batches of P workers."""

from __future__ import annotations

from collections.abc import Iterable

from ringred.errors import TooFewWorkers
from ringred.parameter_server.policies.k_batch_async import KBatchAsync
from ringred.parameter_server.policies.policy import Decision

__all__ = ["SoftSync"]


class SoftSync(KBatchAsync):
    """K-batch-async with K = ⌊P/n⌋: staleness is about n, however many workers there are.

    Zhang, Gupta, Lian and Liu, Staleness-aware Async-SGD for Distributed Deep Learning (IJCAI 2016). Where workers come
    or go, K stays what it was at the start.
    """

    name = "soft_sync"

    def __init__(self, n: int, *, elastic: bool = False) -> None:
        if n < 1:
            raise ValueError(f"SoftSync: expected n of at least 1, got {n}")
        super().__init__(1, elastic=elastic)  # K depends on the number of workers, which `start` tells
        self.n = n

    def start(self, workers: Iterable[int]) -> Decision:
        workers = set(workers)
        if len(workers) < self.n:
            raise TooFewWorkers(f"{self} needs at least {self.n} workers; {len(workers)} were started")
        self.k = len(workers) // self.n
        return super().start(workers)

    def gradients_per_update(self, workers: int) -> int:
        return workers // self.n

    def __repr__(self) -> str:
        return f"SoftSync({self.n}{', elastic=True' if self.elastic else ''})"
