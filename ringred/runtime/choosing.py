"""The part of a communicator that prices algorithms and chooses among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringred.runtime import explain, probe
from ringred.runtime.planner import Planner
from ringred.runtime.runner import Runner
from ringred.runtime.select import choose, machine_model
from ringred.topology.calibrate import Costs, Tuning
from ringred.topology.model import Topology
from ringred.transports.base import Transport
from ringred.transports.shm_player import engine

__all__ = ["Choosing"]

_MEMORIES = ("tensor", "window", "short tensor", "short window")


class Choosing:
    """What a communicator knows of its costs, measured or built in."""

    transport: Transport
    hosts: tuple[int, ...]
    tuning: Tuning
    _planner: Planner
    _runner: Runner

    def tune(self, tuning: Tuning) -> None:
        """Makes "auto" use the costs in `tuning`, the same on every rank; {} means the built-in costs."""
        self.tuning = dict(tuning)
        self._planner.models = self._models()
        self._planner.native = self.tuning.get("native")
        self._planner.forget()
        self._runner.recall.stale = True

    def choice(self, nbytes: int, collective: str = "all_reduce", memory: str = "tensor") -> str:
        """The algorithm that "auto" chooses for `nbytes` bytes in memory of kind `memory` (see `memory_of`)."""
        model = self._planner.model(memory, nbytes)
        return choose(collective, nbytes, model, native=self._native_costs(collective))[0].name

    def predicted_seconds(self, nbytes: int) -> float:
        """The cost model's time of an all-reduce of `nbytes` bytes in memory of `empty`, by the algorithm that
        "auto" takes."""
        native = self._native_costs("all_reduce")
        return choose("all_reduce", nbytes, self._planner.model("window", nbytes), native=native)[1].seconds

    def memory_of(self, tensor: Tensor) -> str:
        """The kind of memory that `tensor` lies in: "window" if it came from `empty` and peers share it."""
        return self._planner.memory_of(tensor)

    def explain(
        self: Any, nbytes: int, collective: str = "all_reduce", *, memory: str = "tensor", measured: bool = False
    ) -> str:
        """The algorithms for `nbytes` bytes with their predicted times; the first is what "auto" takes.

        `memory` is "tensor" for ordinary tensors, "window" for those from `empty`. With `measured=True` each
        algorithm is also timed, on float32; this is collective and works for all-reduce only.
        """
        elements = max(1, nbytes // 4)
        shared = measured and memory == "window"
        tensor = self.empty(elements, torch.float32) if shared else torch.empty(elements, device=self._planner.device)
        return explain.table(
            collective,
            nbytes,
            self._planner.model(memory, nbytes),
            self._native_costs(collective),
            ("measured on this machine" if self.tuning else "built-in costs")
            + (f", run by {engine(self.transport.player)}" if self.transport.windows else ""),
            (lambda candidate: probe.seconds_of(self, tensor, candidate.name, 5)) if measured else None,
        )

    def _models(self) -> dict[str, Topology]:
        return {memory: machine_model(self.transport.model, self.hosts, self.tuning, memory) for memory in _MEMORIES}

    def _native_costs(self, collective: str) -> Costs | None:
        return self.tuning.get("native") if collective == "all_reduce" else None
