"""Reports of training as scalars in a log: TensorBoard's, Weights & Biases', or any other."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any, Protocol, TypeAlias

from ringred.communicator import Communicator
from ringred.data_parallel.overlap import OverlapReport
from ringred.data_parallel.stragglers import StragglerReport
from ringred.errors import RingredError

__all__ = ["Monitor", "Report", "write_scalars"]

Report: TypeAlias = OverlapReport | StragglerReport


def write_scalars(writer: Any, step: int, *reports: Report) -> None:
    """Writes the scalars of `reports` to a log: a TensorBoard `writer` (`torch.utils.tensorboard.SummaryWriter`, or any
    object with its `add_scalar`), a run of Weights & Biases (any object with its `log`), or a function that takes
    a dictionary and the step. Raises TypeError for anything else."""
    _write(writer, step, {name: value for report in reports for name, value in report.scalars().items()})


class Reporting(Protocol):
    """A `ringred.DistributedDataParallel`, as a monitor sees it."""

    comm: Communicator
    recovery: Any

    def overlap_report(self) -> OverlapReport:
        """How much of the last reductions backward hid. Raises `RingredError` before there were any."""

    def straggler_report(self) -> StragglerReport:
        """Whom the others waited for. Collective."""


class Monitor:
    """Writes what a model's communication costs to a log, once in `every` steps.

        monitor = ringred.reports.Monitor(model, writer, every=50)  # the writer of rank 0; None on the others
        for batch in loader:
            ...
            optimizer.step()
            monitor.step()  # on all ranks

    `overlap/…` and `straggler/…` are those of the model's reports; `traffic/bytes_sent` and `traffic/messages_sent` are
    of this rank, a step; `step/ms` is the time of a step, waiting for data included. A log is one of those that
    `write_scalars` takes. Of a model that goes on after failures (`on_failure="shrink"`) stragglers are left out, for
    they are asked of all ranks, which come and go. Raises ValueError unless `every` is positive.
    """

    def __init__(self, model: Reporting, log: Any, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"Monitor: expected every ≥ 1, got {every}")
        self._model, self._log, self._every = model, log, every
        self._steps = 0
        self._begin()

    def _begin(self) -> None:
        self._comm, self._counted, self._before = self._model.comm, 0, self._now()

    def _now(self) -> tuple[float, int, int]:
        counters = self._model.comm.counters
        return time.perf_counter(), counters.bytes_sent, counters.messages_sent

    def step(self, at: int | None = None) -> dict[str, float] | None:
        """Counts a step, which is number `at` in the log, or as many as were counted; when it is due, writes and
        returns the scalars. Collective then, as `straggler_report` is."""
        self._steps += 1
        if self._model.comm is not self._comm:  # ranks failed, or came: another communicator counts from 0
            self._begin()
        else:
            self._counted += 1
        if self._steps % self._every:
            return None
        values: dict[str, float] = {}
        if self._counted:
            spent = [(now - before) / self._counted for now, before in zip(self._now(), self._before, strict=True)]
            values = {"step/ms": spent[0] * 1e3, "traffic/bytes_sent": spent[1], "traffic/messages_sent": spent[2]}
        with contextlib.suppress(RingredError):  # no synchronised backward was made yet
            values |= self._model.overlap_report().scalars()
        if self._model.recovery is None:
            values |= self._model.straggler_report().scalars()
        if self._log is not None:
            _write(self._log, self._steps if at is None else at, values)
        self._begin()
        return values


def _write(log: Any, step: int, values: dict[str, float]) -> None:
    if hasattr(log, "add_scalar"):
        for name, value in values.items():
            log.add_scalar(name, value, step)
    elif hasattr(log, "log") and not isinstance(log, logging.Logger):
        log.log(values, step=step)
    elif callable(log):
        log(values, step)
    else:
        raise TypeError(f"expected a log with add_scalar or log, or a function, got {type(log).__name__}")
