"""Draws one training step from the traces of its ranks: forward, backward, and the reduction of each bucket.

RINGRED_TRACE=out/trace.json launch/mpirun.sh 2 benchmarks/scaling.py --algorithms ring --bucket-mb 2 --short
python benchmarks/plot_overlap.py out/trace.rank0.json out/trace.rank1.json --output docs/overlap.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"forward": "#8c8c8c", "backward": "#4c72b0", "bucket": "#dd8452"}


def step(events: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The spans of the `number`-th step, from its forward to the end of its last bucket."""
    forwards = sorted((e for e in events if e["name"] == "forward"), key=lambda e: e["ts"])
    backwards = sorted((e for e in events if e["name"] == "backward"), key=lambda e: e["ts"])
    backward = backwards[number]
    forward = max((e for e in forwards if e["ts"] < backward["ts"]), key=lambda e: e["ts"])
    following = min((e["ts"] for e in forwards if e["ts"] > backward["ts"]), default=float("inf"))
    buckets = [
        e for e in events if e["name"].startswith("bucket") and e["ph"] == "X" and forward["ts"] < e["ts"] < following
    ]
    return [forward, backward, *sorted(buckets, key=lambda e: e["ts"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--step", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = pyplot.subplots(
        len(options.traces),
        1,
        sharex=True,
        figsize=(10, 1.7 * len(options.traces)),
        layout="constrained",
        squeeze=False,
    )
    spans = [step(json.loads(path.read_text())["traceEvents"], options.step) for path in options.traces]
    origin = min(span["ts"] for rank in spans for span in rank)
    for rank, (axis,) in zip(spans, axes, strict=True):
        for span in rank:
            kind = span["name"].split()[0]
            line = 1 if kind == "bucket" else 0
            left, width = (span["ts"] - origin) / 1000, span["dur"] / 1000
            axis.barh(line, width, left=left, color=COLOURS[kind], edgecolor="white", height=0.8)
            label = span["name"].split()[1] if kind == "bucket" else span["name"]
            axis.text(left + width / 2, line, label, ha="center", va="center", fontsize=7, color="white")
        axis.set_yticks([0, 1], ["model", "buckets reduced"])
        axis.invert_yaxis()
        axis.set_title(f"rank {rank[0]['pid']}", loc="left", fontsize=9)
    axes[-1][0].set_xlabel("ms")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
