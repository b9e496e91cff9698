"""Reports of training, written where people look at them."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Report", "write_scalars"]


class Report(Protocol):
    """An `OverlapReport` or a `StragglerReport`."""

    def scalars(self) -> dict[str, float]:
        """What a log keeps of it, by name."""


def write_scalars(writer: Any, step: int, *reports: Report) -> None:
    """Writes the scalars of `reports` to a TensorBoard `writer` (`torch.utils.tensorboard.SummaryWriter`, or anything
    with its `add_scalar`)."""
    for report in reports:
        for name, value in report.scalars().items():
            writer.add_scalar(name, value, step)
