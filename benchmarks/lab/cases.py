"""What the laboratory can be asked to measure, on which network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.network import Network

__all__ = ["Case", "Experiment"]


@dataclass(frozen=True)
class Case:
    """A training step of a model whose times are `dilation` times those of its profile.

    `way` is an all-reduce algorithm, "gloo" (torch's own DistributedDataParallel), "alone", or a policy of the
    parameter server: "servers:sync" with a shard on each rank, "hosts:sync" the same where the ranks of a host are one
    worker, "server:sync" with one server. The last host computes `slowness` times as long.
    """

    model: str
    way: str
    dilation: float = 1.0
    cap_mib: float | None = None
    batch: int | None = None
    slowness: float = 1.0
    label: str = ""

    @property
    def name(self) -> str:
        """What a table calls it, beside its way."""
        return f"{self.model} {self.label}".strip()


@dataclass(frozen=True)
class Experiment:
    """All-reduces of `sizes` bytes by `ways`, the training steps that `cases` gives for a network, or trainings of real
    models (`trainings`, by `ways`), on each of `networks`. `by` is "torch" (Gloo connects the ranks) or "mpi".
    """

    question: str
    networks: tuple[Network, ...]
    by: str
    ways: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    cases: Callable[[Network], Sequence[Case]] | None = None
    trainings: tuple[str, ...] = ()
    steps: int = 2
    seconds: float = 1.0
