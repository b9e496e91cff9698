"""An experiment's rows as cells of a table, for text and for the report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["cells", "foretold", "precision", "reason", "setting", "worst"]


def foretold(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were predicted, without those that the costs were fitted to, ranks alone, which say nothing, and
    "auto" where what it chose has a row of its own, fitted or not."""
    rows = [row for row in result["rows"] if row["error"] is not None]
    named = {(row["hosts"], row["case"], row["predicted"]) for row in rows if row["way"] != "auto"}
    return [
        row
        for row in rows
        if not row["fitted"]
        and row["way"] != "alone"
        and not (row["way"] == "auto" and (row["hosts"], row["case"], row["predicted"]) in named)
    ]


def precision(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """How far predictions are off, by kind: cases, the median of the errors, and their 90th percentile."""
    kinds: dict[str, list[float]] = {"all": []}
    for result in results:
        for row in foretold(result):
            if "nbytes" in row:
                kind = "all-reduces up to 64 KiB" if row["nbytes"] <= 64 << 10 else "longer all-reduces"
            else:
                kind = "steps on parameter servers" if ":" in row["way"] else "steps by collectives"
            for one in ("all", kind):
                kinds.setdefault(one, []).append(abs(row["error"]))
    told = [
        (kind, str(len(errors)), f"{statistics.median(errors):.1%}", f"{sorted(errors)[int(0.9 * len(errors))]:.1%}")
        for kind, errors in kinds.items()
        if errors
    ]
    return ["predicted", "cases", "median error", "90th percentile"], told


def worst(results: Sequence[dict[str, Any]], count: int = 10) -> tuple[list[str], list[tuple[str, ...]]]:
    """The predictions that are wrong most, and why."""
    rows = [(result, row) for result in results for row in foretold(result)]
    rows.sort(key=lambda pair: -abs(pair[1]["error"]))
    told = [
        (result["name"], f"{row['case']} {row['way']}", f"{100 * row['error']:+.0f}", reason(result, row))
        for result, row in rows[:count]
    ]
    return ["experiment", "case", "error %", "why"], told


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
    if "failed" in result:
        told += "; some ranks failed, perhaps before others were measured"
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
    spread = any(row.get("low") != row.get("high") for row in result["rows"])
    heads = ["case", "by", "ms", *(["from - to"] if spread else []), "efficiency" if steps else "of line rate"]
    heads += ["predicted ms", "error"]
    if steps:
        heads += ["MiB sent", "received", "reducing ms", "hidden", "late ms"]
    rows = []
    for row in result["rows"]:
        case = f"{row['case']}, {row['hosts']} hosts" if several else row["case"]
        part = f"{row['efficiency' if steps else 'of_line']:.0%}"
        error = "" if row["error"] is None else f"{row['error']:+.0%}{' fitted' if row['fitted'] else ''}"
        ends = " - ".join(_number(row[end], 1e3, 2) for end in ("low", "high") if row.get("low") != row.get("high"))
        told = (case, row["way"], _number(row["seconds"], 1e3, 2), *([ends] if spread else []), part)
        told += (_number(row["predicted"], 1e3, 2), error)
        if steps:
            told += (_number(row["sent"], 2**-20, 1), _number(row["received"], 2**-20, 1))
            told += (_number(row["reducing"] or None, 1e3, 2), _hidden(row), _number(row["late"] or None, 1e3, 1))
        rows.append(told)
    return heads, rows


def _hidden(row: dict[str, Any]) -> str:
    """The part of the reductions' time by which a step is not longer than alone. Not told if a host computes longer."""
    if not row["reducing"] or row.get("slowness", 1.0) != 1.0:
        return ""
    longer = row["seconds"] * (1 - row["efficiency"])
    return f"{max(0.0, 1 - longer / row['reducing']):.0%}"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"
