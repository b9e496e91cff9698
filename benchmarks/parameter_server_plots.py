"""Pictures of what `parameter_server.py` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")

__all__ = ["plot_errors", "plot_staleness"]

_Rows = list[dict[str, Any]]


def plot_errors(rows: _Rows, path: Path) -> None:
    """Error against wall-clock time, a panel for each problem; all-reduces are dashed."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    colours = dict(zip(systems, plt.get_cmap("tab20").colors, strict=False))
    for panel, problem in zip(panels, ("digits", "quadratic"), strict=True):
        for row in [row for row in rows if row["problem"] == problem]:
            seconds, errors = zip(*row["curve"], strict=True)
            style = "--" if row["bytes"] and row["system"] in ("ring", "torus", "tree", "central") else "-"
            panel.plot(seconds, errors, style, color=colours[row["system"]], label=row["system"], linewidth=1.5)
        panel.set(xlabel="seconds", yscale="log", title=problem)
        panel.set_ylabel("test error" if problem == "digits" else "height above the optimum")
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_staleness(rows: _Rows, path: Path) -> None:
    """Of each policy with stale gradients the measured distribution, beside the simulated one."""
    chosen = [row for row in rows if row["problem"] == "quadratic" and row["predicted_staleness"] > 0]
    figure, panels = plt.subplots(1, len(chosen), figsize=(3.2 * len(chosen), 3.2), squeeze=False)
    for panel, row in zip(panels[0], chosen, strict=True):
        measured, simulated = row["distribution"], row["predicted_distribution"]
        last = max(1, next((at for at in range(len(simulated)) if sum(simulated[: at + 1]) > 0.995), len(simulated)))
        places = range(last + 1)
        panel.bar(places, [measured[at] if at < len(measured) else 0.0 for at in places], label="measured", alpha=0.6)
        panel.plot(
            places, [simulated[at] if at < len(simulated) else 0.0 for at in places], "ko-", ms=4, label="simulated"
        )
        panel.set(title=row["system"], xlabel="updates between pull and use")
    panels[0][0].set_ylabel("part of the gradients")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
