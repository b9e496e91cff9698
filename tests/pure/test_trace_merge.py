"""Traces of several ranks in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringred.testing.command.main import main
from ringred.testing.command.trace import merge

NAMES = ["all_reduce #1 (sum, float32, 4 elements, ring)", "broadcast #2 (float32, 4 elements)", "barrier #3 (max)"]


def of_rank(rank: int, begins: list[float], ends: list[float], ahead: float = 0.0) -> list[dict[str, Any]]:
    """The trace of a rank whose clock is `ahead` by so many µs."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}]
    for name, begin, end in zip(NAMES, begins, ends, strict=True):
        span = {"ts": begin + ahead, "dur": end - begin}
        events.append({"ph": "X", "cat": "collective", "name": name, "pid": rank, "tid": 0, "args": {}, **span})
    events.append({"ph": "X", "cat": "ddp", "name": "forward", "pid": rank, "tid": 0, "ts": 900.0 + ahead, "dur": 1.0})
    return events


FIRST = of_rank(0, [100, 200, 300], [150, 250, 350])
LATE = [[120.0, 190.0, 330.0], [152.0, 255.0, 351.0]]


def spans(trace: dict[str, Any], rank: int) -> list[float]:
    return [event["ts"] for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == rank]


def test_times_that_can_be_right_are_left_as_they_are() -> None:
    merged = merge([of_rank(1, *LATE), FIRST])
    assert merged.shifts == {0: 0.0, 1: 0.0}
    assert spans(merged.trace, 1) == [120.0, 190.0, 330.0, 900.0]
    assert (merged.collectives, merged.last) == (3, {0: 1, 1: 2})


@pytest.mark.parametrize("ahead", [-5000.0, 40_000.0])
def test_a_clock_that_is_wrong_is_put_right(ahead: float) -> None:
    merged = merge([FIRST, of_rank(1, *LATE, ahead=ahead)])
    # The barrier bounds it most: rank 1 came 20 before rank 0 left, and left 51 after rank 0 had come.
    assert merged.shifts[1] == pytest.approx((300 - 351 - ahead + 350 - 330 - ahead) / 2)
    assert abs(spans(merged.trace, 1)[0] - 120.0) <= 36
    assert spans(merged.trace, 0) == [100, 200, 300, 900.0]


def test_arrows_lead_from_who_came_last() -> None:
    arrows = [event for event in merge([FIRST, of_rank(1, *LATE)]).trace["traceEvents"] if event["ph"] in "sf"]
    starts = [(event["pid"], event["ts"]) for event in arrows if event["ph"] == "s"]
    assert starts == [(1, 120.0), (0, 200.0), (1, 330.0)]
    ends = [(event["pid"], event["ts"]) for event in arrows if event["ph"] == "f"]
    assert ends == [(0, 150.0), (1, 255.0), (0, 350.0)]


def test_the_command_merges_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for rank, events in ((0, FIRST), (1, of_rank(1, *LATE))):
        files.append(tmp_path / f"t.rank{rank}.json")
        files[-1].write_text(json.dumps({"traceEvents": events}))
    whole = tmp_path / "whole.json"
    assert main(["trace", "merge", *map(str, files), "-o", str(whole)]) == 0
    assert "3 collectives of all 2 ranks" in capsys.readouterr().out
    assert {event["pid"] for event in json.loads(whole.read_text())["traceEvents"]} == {0, 1}
    assert main(["trace", "merge", str(files[0]), str(files[0]), "-o", str(whole)]) == 2
    assert "expected one trace of each rank, got rank 0 twice" in capsys.readouterr().err
    files[0].write_text("{}")
    assert main(["trace", "merge", *map(str, files), "-o", str(whole)]) == 2
    assert "is no trace, as RINGRED_TRACE writes them" in capsys.readouterr().err
