"""The candidates for a collective as a table: what the model predicts of each, and what was measured."""

from __future__ import annotations

from collections.abc import Callable

from tabulate import tabulate

from ringred.runtime.select import Candidate, candidates, decided_as
from ringred.topology.calibrate import Costs
from ringred.topology.model import Topology

__all__ = ["table"]


def table(
    collective: str,
    nbytes: int,
    model: Topology,
    native: Costs | None,
    costs: str,
    measure: Callable[[Candidate], float] | None = None,
) -> str:
    """The algorithms for `nbytes` bytes on the ranks of `model`, the fastest first.

    `costs` says where the model's numbers come from; `native` are those of the transport's own all-reduce, where it is
    one of the candidates; `measure` gives the seconds that one takes.
    """
    decided = decided_as(nbytes)
    found = candidates(collective, model.size, decided, model, native=native)
    columns = ["algorithm", "grid", "predicted µs"]
    rows = [[c.name, "x".join(map(str, c.grid)) if c.grid else "", f"{c.seconds * 1e6:.1f}"] for c in found]
    if measure is not None:
        columns.append("measured µs")
        for row, candidate in zip(rows, found, strict=True):
            row.append(f"{measure(candidate) * 1e6:.1f}")
    head = f"{collective} of {nbytes} bytes (decided as {decided}) on {model.size} ranks, {model.name}"
    return f"{head}, {costs}\n{tabulate(rows, headers=columns, disable_numparse=True)}"
