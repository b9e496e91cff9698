"""What all benchmarks share: interleaved rounds, medians with spread, the machine and versions beside the figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ringred
from ringred.testing.bench.measuring import Spread, interleaved, timed
from ringred.testing.ports import reserved_port
from ringred.topology.detect import machine

__all__ = [
    "KEEP_MEMORY",
    "Spread",
    "context",
    "interleaved",
    "memory_kib",
    "on_ranks",
    "rank_order",
    "timed",
    "write_json",
]

# Settings of glibc, at their greatest: blocks up to 32 MiB stay in the heap, and the heap does not shrink below 1 GiB.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def context() -> dict[str, Any]:
    """Machine, versions and command: without them a figure means nothing."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    here = asdict(machine())
    del here["host"]
    return {
        "machine": here,
        "versions": {
            "ringred": ringred.__version__,
            "revision": revision or "unknown",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
        },
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def on_ranks(script: str, ranks: int, environment: Mapping[str, str], order: Mapping[str, Any]) -> dict[str, Any]:
    """Starts `script` on `ranks` processes, which read `order` by `rank_order`; returns what rank 0 wrote, by
    `write_json`, to the order's "result"."""
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        result = Path(folder) / "result.json"
        common = {
            **os.environ,
            **environment,
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "RINGRED_BENCH_ORDER": json.dumps({**order, "result": str(result)}),
        }
        started = [
            subprocess.Popen([sys.executable, script], env=common | {"RANK": str(rank)}) for rank in range(ranks)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit(f"a rank failed: {order}")
        return dict(json.loads(result.read_text()))


def rank_order() -> dict[str, Any] | None:
    """The order for this process if it is a rank, which is then pinned to a core of its own; None otherwise."""
    if "RINGRED_BENCH_ORDER" not in os.environ:
        return None
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    torch.set_num_threads(1)
    return dict(json.loads(os.environ["RINGRED_BENCH_ORDER"]))


def memory_kib() -> tuple[int, int]:
    """The greatest resident set of this process so far, and its proportional share of memory now, in KiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    rollup = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(status["VmHWM"].split()[0]), int(rollup["Pss"].split()[0])


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes `result`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)
