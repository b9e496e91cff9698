"""Traces are what Perfetto opens, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

from ringred.runtime.trace import Tracer, trace_path


def test_a_trace_is_chrome_json(tmp_path: Path) -> None:
    tracer = Tracer(1, 2, str(tmp_path / "out" / "trace.json"))
    tracer.span("ddp", "bucket 0", 1_000_000, 3_500_000, "buckets", bytes=4)
    tracer.instant("ddp", "ready", 900_000, "buckets")
    with tracer.record("ddp", "forward"):
        pass
    written = tracer.write()
    assert written == tmp_path / "out" / "trace.rank1.json"
    events = json.loads(written.read_text())["traceEvents"]
    span = next(event for event in events if event["name"] == "bucket 0")
    assert span["ph"] == "X"
    assert span["dur"] == 2500.0
    assert span["pid"] == 1
    assert span["args"] == {"bytes": 4}
    lines = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert lines[span["tid"]] == "buckets"
    assert sorted(lines.values()) == ["MainThread", "buckets"]
    assert list(written.parent.iterdir()) == [written]


def test_the_file_of_a_rank() -> None:
    assert str(trace_path("a/b.json", 0, 1)) == "a/b.json"
    assert str(trace_path("a/b.json", 3, 8)) == "a/b.rank3.json"
    assert str(trace_path("b", 3, 8)) == "b.rank3.json"


def test_without_a_file_nothing_is_written() -> None:
    assert Tracer(0, 1).write() is None
