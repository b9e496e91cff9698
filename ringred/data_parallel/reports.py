"""Reports of training as scalars in a log, such as TensorBoard's."""

from __future__ import annotations

from typing import Any, TypeAlias

from ringred.data_parallel.overlap import OverlapReport
from ringred.data_parallel.stragglers import StragglerReport

__all__ = ["Report", "write_scalars"]

Report: TypeAlias = OverlapReport | StragglerReport


def write_scalars(writer: Any, step: int, *reports: Report) -> None:
    """Writes the scalars of `reports` to a TensorBoard `writer` (`torch.utils.tensorboard.SummaryWriter`, or any object
    with its `add_scalar` method)."""
    for report in reports:
        for name, value in report.scalars().items():
            writer.add_scalar(name, value, step)
