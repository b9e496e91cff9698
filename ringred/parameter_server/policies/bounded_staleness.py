"""Bounded staleness (stale synchronous parallel): no worker is more than s mini-batches ahead of the slowest."""

from __future__ import annotations

from collections.abc import Iterable

from ringred.parameter_server.policies.policy import Decision, Gradient, Policy

__all__ = ["BoundedStaleness"]


class BoundedStaleness(Policy):
    """Every gradient is an update. A worker that has finished c mini-batches starts the next if the slowest living
    worker has finished c − s or more, else it waits. s = 0: all start each mini-batch together.

    Ho et al., More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server (NIPS 2013).
    """

    name = "bounded_staleness"

    def __init__(self, s: int, *, elastic: bool = False) -> None:
        super().__init__(elastic=elastic)
        if s < 0:
            raise ValueError(f"BoundedStaleness: expected s of at least 0, got {s}")
        self.s = s
        self.clocks: dict[int, int] = {}
        self.waiting: set[int] = set()

    def start(self, workers: Iterable[int]) -> Decision:
        decision = super().start(workers)
        self.clocks = dict.fromkeys(self.workers, 0)
        return decision

    def joined(self, worker: int) -> Decision:
        """It counts as having finished as much as the slowest."""
        self.clocks[worker] = min(self.clocks.values(), default=0)
        self.workers.add(worker)
        self.waiting.discard(worker)
        return Decision(release=(worker,))

    def left(self, worker: int) -> Decision:
        self.workers.discard(worker)
        self.clocks.pop(worker, None)
        self.waiting.discard(worker)
        self._check_workers(f"worker {worker} left, and none are there")
        return Decision(release=self._released())

    def pushed(self, gradient: Gradient) -> Decision:
        self._check_gradient(gradient)
        self.version += 1
        self.clocks[gradient.worker] += 1
        self.waiting.add(gradient.worker)
        return Decision(apply=(gradient,), release=self._released())

    def _released(self) -> tuple[int, ...]:
        ahead = min(self.clocks.values()) + self.s
        released = sorted(worker for worker in self.waiting if self.clocks[worker] <= ahead)
        self.waiting.difference_update(released)
        return tuple(released)

    def __repr__(self) -> str:
        return f"BoundedStaleness({self.s}{', elastic=True' if self.elastic else ''})"
