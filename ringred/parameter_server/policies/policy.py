"""What a policy of a parameter server is: a state machine that is told what happened, and answers what happens next.

It has no clock, no socket and no tensor. The server and the simulator run the same object, so what is proved of it in
simulated time holds for the live server.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from ringred.errors import PolicyError, TooFewWorkers

__all__ = ["Decision", "FirstK", "Gradient", "Policy"]


class Gradient(NamedTuple):
    """One mini-batch's gradient: the worker's `sequence`-th, computed at the parameters of `version`."""

    worker: int
    sequence: int
    version: int


class Decision(NamedTuple):
    """What happens next, in this order.

    `apply`: these gradients, sorted by worker, make one update together, and the version grows by one; or none.
    `drop`: these gradients came too late and are not used.
    `cancel`: these workers' mini-batches in progress are thrown away; each of them is in `release` too.
    `release`: these workers take the parameters of the newest version and start their next mini-batch.
    """

    apply: tuple[Gradient, ...] = ()
    drop: tuple[Gradient, ...] = ()
    cancel: tuple[int, ...] = ()
    release: tuple[int, ...] = ()


class Policy:
    """The base of all policies: who the workers are, and the version, which is the number of updates decided.

    `version` and the sets below change only in `start`, `joined`, `left` and `pushed`.
    """

    name: ClassVar[str]

    def __init__(self, *, elastic: bool = False) -> None:
        self.elastic = elastic
        self.version = 0
        self.workers: set[int] = set()

    def start(self, workers: Iterable[int]) -> Decision:
        """All of them are there; they begin at version 0. Raises `TooFewWorkers` if the policy needs more."""
        self.workers = set(workers)
        self._check_workers(f"{len(self.workers)} were started")
        return Decision(release=tuple(sorted(self.workers)))

    def joined(self, worker: int) -> Decision:
        """`worker` is there, for the first time or again."""
        raise NotImplementedError

    def left(self, worker: int) -> Decision:
        """`worker` died or went away; what it has pushed counts. Raises `TooFewWorkers` where that stops the job."""
        raise NotImplementedError

    def pushed(self, gradient: Gradient) -> Decision:
        """`gradient` is there. Raises `PolicyError` for a worker that is not, and for a version from the future."""
        raise NotImplementedError

    @property
    def fewest(self) -> int:
        """How many workers must be there for the policy to go on."""
        return 1

    def gradients_per_update(self, workers: int) -> int:
        """How many gradients make one update where there are `workers` workers."""
        return 1

    def _check_workers(self, how: str) -> None:
        if len(self.workers) < self.fewest:
            raise TooFewWorkers(f"{self} needs {self.fewest} workers; {how}")

    def _check_gradient(self, gradient: Gradient) -> None:
        if gradient.worker not in self.workers:
            raise PolicyError(f"worker {gradient.worker} pushed, and is not among the workers {sorted(self.workers)}")
        if not 0 <= gradient.version <= self.version:
            raise PolicyError(
                f"worker {gradient.worker} pushed a gradient at version {gradient.version}; "
                f"expected 0 to {self.version}, the version of now"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'elastic=True' if self.elastic else ''})"


class FirstK(Policy):
    """The first K gradients make an update. Two questions tell the variants apart.

    Does a worker that has pushed wait for the update, so that K gradients come from K workers (`finisher_waits`)? Are
    mini-batches that are in progress at an update thrown away, so that no gradient is stale (`others_cancelled`)?
    The four answers, and the names: Dutta et al., Slow and Stale Gradients Can Win the Race (AISTATS 2018).
    """

    finisher_waits: ClassVar[bool]
    others_cancelled: ClassVar[bool]

    def __init__(self, k: int, *, elastic: bool = False) -> None:
        super().__init__(elastic=elastic)
        if k < 1:
            raise ValueError(f"{type(self).__name__}: expected K of at least 1, got {k}")
        self.k = k
        self.pending: list[Gradient] = []

    @property
    def fewest(self) -> int:
        return self.k if self.finisher_waits and not self.elastic else 1

    def gradients_per_update(self, workers: int) -> int:
        return self.k

    @property
    def needed(self) -> int:
        """How many gradients make the next update: K, or less where workers are missing and `elastic` is set."""
        if self.finisher_waits and self.elastic:
            return max(1, min(self.k, len(self.workers)))
        return self.k

    def joined(self, worker: int) -> Decision:
        self.workers.add(worker)
        if self.finisher_waits and worker in {gradient.worker for gradient in self.pending}:
            return Decision()  # it died after it had pushed, and is released with the update that this is part of
        return Decision(release=(worker,))

    def left(self, worker: int) -> Decision:
        self.workers.discard(worker)
        self._check_workers(f"worker {worker} left, and {len(self.workers)} are there")
        return self._update(None) if len(self.pending) >= self.needed else Decision()

    def pushed(self, gradient: Gradient) -> Decision:
        self._check_gradient(gradient)
        if self.others_cancelled and gradient.version < self.version:
            return Decision(drop=(gradient,))  # its worker was cancelled and released when that version ended
        self.pending.append(gradient)
        if len(self.pending) >= self.needed:
            return self._update(gradient.worker)
        return Decision(release=() if self.finisher_waits else (gradient.worker,))

    def _update(self, finisher: int | None) -> Decision:
        applied, self.pending = tuple(sorted(self.pending)), []
        self.version += 1
        idle = {gradient.worker for gradient in applied} if self.finisher_waits else {finisher}
        if self.others_cancelled:
            return Decision(applied, cancel=tuple(sorted(self.workers - idle)), release=tuple(sorted(self.workers)))
        return Decision(applied, release=tuple(sorted(self.workers & idle)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.k}{', elastic=True' if self.elastic else ''})"
