"""`ringred trace merge`: the traces of all ranks in one file, on one clock, with who was waited for."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from ringred.testing.command.parsing import Parser, add_json, say

__all__ = ["add_trace", "merge"]


class Merged(NamedTuple):
    """One trace of all ranks; by rank, the microseconds by which its times were shifted, and how often it was the last
    to come to a collective; and the number of collectives that all ranks have."""

    trace: dict[str, Any]
    shifts: dict[int, float]
    last: dict[int, int]
    collectives: int


def add_trace(commands: Any) -> None:
    """Adds the command to the others."""
    trace = commands.add_parser("trace", help="work with traces that RINGRED_TRACE wrote")
    kinds = trace.add_subparsers(required=True, metavar="WHAT", parser_class=Parser)
    merging = kinds.add_parser("merge", help="one trace of all ranks, for Perfetto or chrome://tracing")
    merging.add_argument("files", type=Path, nargs="+", metavar="FILE", help="trace.rank0.json trace.rank1.json ...")
    merging.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    add_json(merging, "what was merged, as JSON")
    merging.set_defaults(command=_merge)


def _merge(options: argparse.Namespace) -> int:
    if options.output.resolve() in [path.resolve() for path in options.files]:
        raise ValueError(f"trace: {options.output} is one of the traces: give another name for the whole")
    merged = merge([_read(path) for path in options.files])
    options.output.write_text(json.dumps(merged.trace))
    ranks = sorted(merged.shifts)
    rows = [(rank, f"{merged.shifts[rank]:+.1f}", merged.last[rank]) for rank in ranks]
    heads = ["rank", "shifted by µs", "last of all to come"]
    keys = ("rank", "shifted_us", "last")
    result = {
        "output": str(options.output),
        "collectives": merged.collectives,
        "ranks": [dict(zip(keys, (rank, merged.shifts[rank], merged.last[rank]), strict=True)) for rank in ranks],
    }
    text = f"{tabulate(rows, headers=heads, disable_numparse=True, colalign=['right'] * 3)}\n\n"
    say(options, result, f"{text}{merged.collectives} collectives of all {len(ranks)} ranks: {options.output}")
    return 0


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        events = list(json.loads(path.read_text())["traceEvents"])
        ranks = {event["pid"] for event in events}
        timed = [event for event in events if event["ph"] != "M"]
        whole = all(isinstance(event["ts"], (int, float)) and isinstance(event["name"], str) for event in timed)
    except (ValueError, KeyError, TypeError):
        ranks, whole = set(), False
    if not whole or not ranks:
        raise ValueError(f"trace: {path} is no trace, as RINGRED_TRACE writes them")
    if len(ranks) > 1:
        raise ValueError(f"trace: {path} is of {len(ranks)} ranks: it was merged already")
    return events


def merge(traces: Sequence[list[dict[str, Any]]]) -> Merged:
    """All ranks' events in one trace. Raises ValueError if two traces are of one rank.

    Clocks of hosts differ. No rank leaves an all-reduce or a barrier before the last one has come, which bounds by how
    much a rank's clock differs from that of the lowest rank, from both sides, as in NTP. Times are shifted only if they
    break those bounds. Arrows lead from who came last to a collective to those who waited for it.
    """
    of_rank: dict[int, list[dict[str, Any]]] = {}
    for events in traces:
        (rank,) = {event["pid"] for event in events}
        if rank in of_rank:
            raise ValueError(f"trace: expected one trace of each rank, got rank {rank} twice")
        of_rank[rank] = events
    calls = {rank: _collectives(events) for rank, events in of_rank.items()}
    first = min(of_rank)
    shifts = {rank: _shift(calls[first], calls[rank]) for rank in of_rank}
    merged: list[dict[str, Any]] = []
    for rank, events in sorted(of_rank.items()):
        merged.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        merged += [event | {"ts": event["ts"] + shifts[rank]} if "ts" in event else event for event in events]
    common = [key for key in calls[first] if all(key in of for of in calls.values())]
    last: Counter[int] = Counter()
    for number, key in enumerate(common):
        begins = {rank: calls[rank][key]["ts"] + shifts[rank] for rank in of_rank}
        late = max(begins, key=lambda rank: (begins[rank], rank))
        last[late] += 1
        arrow = {"cat": "waited for", "name": f"waited for rank {late}", "id": number}
        merged.append(arrow | {"ph": "s", "pid": late, "tid": calls[late][key]["tid"], "ts": begins[late]})
        for rank in of_rank:
            if rank != late:
                event = calls[rank][key]
                end = event["ts"] + shifts[rank] + event["dur"]
                merged.append(arrow | {"ph": "f", "bp": "e", "pid": rank, "tid": event["tid"], "ts": end})
    counted = {rank: last[rank] for rank in of_rank}
    return Merged({"traceEvents": merged, "displayTimeUnit": "ms"}, shifts, counted, len(common))


def _collectives(events: Sequence[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """The collectives by their name, in which is their number, and by how often there was one of that name."""
    seen: Counter[str] = Counter()
    found = {}
    for event in events:
        if event.get("cat") == "collective":
            found[event["name"], seen[event["name"]]] = event
            seen[event["name"]] += 1
    return found


def _shift(reference: dict[tuple[str, int], dict[str, Any]], mine: dict[tuple[str, int], dict[str, Any]]) -> float:
    both = [key for key in reference if key in mine and key[0].startswith(("all_reduce", "barrier"))]
    if not both:
        return 0.0
    least = max(reference[key]["ts"] - (mine[key]["ts"] + mine[key]["dur"]) for key in both)
    most = min(reference[key]["ts"] + reference[key]["dur"] - mine[key]["ts"] for key in both)
    return 0.0 if least <= 0.0 <= most else float((least + most) / 2)
