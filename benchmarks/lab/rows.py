"""An experiment's rows as cells of a table, for text and for the report."""

from __future__ import annotations

from typing import Any

__all__ = ["cells", "foretold", "reason", "setting"]


def foretold(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were predicted, without those that the costs were fitted to, and ranks alone, which say nothing."""
    return [row for row in result["rows"] if row["error"] is not None and not row["fitted"] and row["way"] != "alone"]


def reason(result: dict[str, Any], row: dict[str, Any]) -> str:
    """Why a prediction is likely wrong, as far as it was found out (benchmarks/results/lab.md says more)."""
    way, nbytes = row["way"], row.get("nbytes")
    if ":" in way:
        return "what servers do beside encrypting and sending is not counted"
    if nbytes is not None and nbytes <= 1 << 10:
        return "a call's own cost counts most, and is one number for all algorithms"
    if any("ranks" in network for network in result["networks"]):
        return "the ranks of a host share cores"
    if result["name"] == "bbr":
        return "the simulator knows no BBR"
    if way in ("tree", "double_tree", "central", "direct"):
        return "how several senders come to terms at a port is one number"
    return "not found"


def setting(result: dict[str, Any]) -> str:
    """Where it was measured: the networks, what connects the ranks, and how many times slower models are replayed."""
    told = f"{'; '.join(result['networks'])}; {result['by']}"
    slower = sorted({row.get("dilation", 1.0) for row in result["rows"]} - {1.0})
    if not slower:
        return told
    span = f"{slower[0]:g} to {slower[-1]:g}" if len(slower) > 1 else f"{slower[0]:g}"
    return f"{told}; models {span} times slower than their profile"


def cells(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Heads and rows."""
    first = result["rows"][0]
    several = len(result["networks"]) > 1
    if "training" in first:
        heads = ["training", "by", "seconds until good enough", "mini-batches of a rank", "reached at last"]
        return heads, [
            (
                row["case"],
                row["way"],
                _number(row["seconds"], 1, 1) or "never",
                str(row["batches"] or ""),
                _number(row["quality"], 1, 3),
            )
            for row in result["rows"]
        ]
    steps = "efficiency" in first
    heads = ["case", "by", "ms", "efficiency" if steps else "of line rate", "predicted ms", "error"]
    if steps:
        heads += ["MiB sent", "received", "reducing ms", "late ms"]
    rows = []
    for row in result["rows"]:
        case = f"{row['case']}, {row['hosts']} hosts" if several else row["case"]
        part = f"{row['efficiency' if steps else 'of_line']:.0%}"
        error = "" if row["error"] is None else f"{row['error']:+.0%}{' fitted' if row['fitted'] else ''}"
        told = (case, row["way"], _number(row["seconds"], 1e3, 2), part, _number(row["predicted"], 1e3, 2), error)
        if steps:
            told += (_number(row["sent"], 2**-20, 1), _number(row["received"], 2**-20, 1))
            told += (_number(row["reducing"] or None, 1e3, 2), _number(row["late"] or None, 1e3, 1))
        rows.append(told)
    return heads, rows


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"
