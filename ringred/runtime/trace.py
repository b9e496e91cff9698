"""Records timed events and writes them as a Chrome trace, for Perfetto or chrome://tracing. No cost if unused."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Tracer", "trace_path"]


def trace_path(path: str, rank: int, size: int) -> Path:
    """The file of one rank: `path` itself for a single rank, else with the rank inserted before the suffix."""
    whole = Path(path)
    return whole if size == 1 else whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix or '.json'}")


class Tracer:
    """Collects spans and instants of one rank; times are `time.monotonic_ns`. Any thread may add to it.

    Spans of a thread are drawn on that thread's line; `line` names another one.
    """

    def __init__(self, rank: int, size: int, path: str | None = None) -> None:
        self.rank, self.size = rank, size
        self.path = None if path is None else trace_path(path, rank, size)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # so that a bad path fails now, not at the end
        self.events: list[dict[str, Any]] = []
        self._lines: dict[str, int] = {}
        # Ranks on one host share the monotonic clock; the wall clock aligns the traces of different hosts.
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def span(
        self,
        category: str,
        name: str,
        start_ns: int,
        end_ns: int,
        line: str | None = None,
        **args: object,
    ) -> None:
        """Something that lasted from `start_ns` to `end_ns`."""
        self.events.append(
            {
                "ph": "X",
                "cat": category,
                "name": name,
                "pid": self.rank,
                "tid": self._line(line),
                "ts": (start_ns + self._offset_ns) / 1000,
                "dur": (end_ns - start_ns) / 1000,
                "args": args,
            }
        )

    def instant(self, category: str, name: str, at_ns: int, line: str | None = None, **args: object) -> None:
        """Something that happened at `at_ns`."""
        self.events.append(
            {
                "ph": "i",
                "s": "t",
                "cat": category,
                "name": name,
                "pid": self.rank,
                "tid": self._line(line),
                "ts": (at_ns + self._offset_ns) / 1000,
                "args": args,
            }
        )

    @contextmanager
    def record(self, category: str, name: str, line: str | None = None) -> Iterator[None]:
        """A span around a block."""
        start = time.monotonic_ns()
        try:
            yield
        finally:
            self.span(category, name, start, time.monotonic_ns(), line)

    def _line(self, line: str | None) -> int:
        return self._lines.setdefault(line or threading.current_thread().name, len(self._lines))

    def write(self) -> Path | None:
        """Writes the trace to its file, completely or not at all; returns the file's path."""
        if self.path is None:
            return None
        names = [("process_name", 0, f"rank {self.rank}")]
        names += [("thread_name", number, name) for name, number in self._lines.items()]
        meta = [
            {"ph": "M", "name": kind, "pid": self.rank, "tid": number, "args": {"name": name}}
            for kind, number, name in names
        ]
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps({"traceEvents": meta + self.events, "displayTimeUnit": "ms"}))
        unfinished.replace(self.path)
        return self.path
