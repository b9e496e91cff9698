"""What `all_reduce.py` shows of its rows: a table, ratios to ringred, a plot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

BUS = {  # nccl-tests: bytes over a link for each byte of the collective
    "all_reduce": lambda size: 2 * (size - 1) / size,
    "reduce_scatter": lambda size: (size - 1) / size,
    "all_gather": lambda size: (size - 1) / size,
    "broadcast": lambda size: 1.0,
    "all_to_all": lambda size: (size - 1) / size,
}


class Row(NamedTuple):
    """One system with one kind of memory at one size; times in microseconds, over all starts."""

    system: str
    algorithm: str
    transport: str
    memory: str
    nbytes: int
    time: float
    low: float
    high: float
    whole: float
    wrong: int


def table(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """A table like that of nccl-tests, with columns for the system, its memory and the whole time."""
    bus = BUS[arguments.collective](arguments.ranks)
    operation = "sum" if arguments.collective in ("all_reduce", "reduce_scatter") else "none"
    root = 0 if arguments.collective == "broadcast" else -1
    width = {"float16": 2, "bfloat16": 2, "float64": 8, "int64": 8}.get(arguments.dtype, 4)
    lines = []
    for row in rows:
        algbw = row.nbytes / row.time / 1e3
        lines.append(
            (
                row.nbytes,
                max(1, row.nbytes // width),
                arguments.dtype,
                operation,
                root,
                f"{row.time:.1f}",
                f"{row.low:.1f}..{row.high:.1f}",
                f"{row.whole:.1f}",
                f"{algbw:.3f}",
                f"{algbw * bus:.3f}",
                row.wrong,
                row.system,
                row.memory,
                row.algorithm,
            )
        )
    head = ["size", "count", "type", "redop", "root", "time", "least..greatest start", "whole", "algbw", "busbw"]
    units = "size in bytes, times in µs, bandwidths in GB/s"
    return tabulate(lines, headers=[*head, "#wrong", "system", "memory", "algorithm"], floatfmt="g") + f"\n{units}"


def ratios(rows: Sequence[Row]) -> str:
    """How many times longer each peer takes than ringred, by size and ringred's memory."""
    ours = {(row.memory, row.nbytes): row.time for row in rows if row.system == "ringred"}
    others = sorted({row.system for row in rows if row.system != "ringred"})
    times = {(row.system, row.nbytes): row.time for row in rows}
    lines = [
        (
            nbytes,
            memory,
            f"{own:.1f}",
            *(f"{times[o, nbytes] / own:.2f}" if (o, nbytes) in times else "" for o in others),
        )
        for (memory, nbytes), own in sorted(ours.items(), key=lambda item: (item[0][0], item[0][1]))
    ]
    return tabulate(lines, headers=["size", "memory", "ringred µs", *others], disable_numparse=True)


def plot(rows: Sequence[Row], arguments: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        series.setdefault((row.system, row.memory), []).append(row)
    for (system, memory), found in sorted(series.items()):
        own, limit = system.startswith("ringred"), system == "limit"
        label = f"{system} ({memory})" if own else system
        style = "k:" if limit else "-" if own else "--"
        sizes = [row.nbytes for row in found]
        axes.loglog(sizes, [row.time for row in found], style, marker=None if limit else "o", markersize=3, label=label)
        if not limit:
            axes.fill_between(sizes, [row.low for row in found], [row.high for row in found], alpha=0.15)
    axes.set_xlabel("bytes")
    axes.set_ylabel("µs a call, buffers touched (less is better)")
    axes.set_title(f"{arguments.collective}, {arguments.dtype}, {arguments.ranks} ranks on one host")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
