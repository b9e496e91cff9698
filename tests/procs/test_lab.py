"""The laboratory's hosts: a short run from the command, and what a killed one leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.procs.launching import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from lab import hosts

REASON = hosts.unavailable()
pytestmark = [
    pytest.mark.procs,
    pytest.mark.timeout(150),
    pytest.mark.skipif(REASON is not None, reason=f"no hosts here: {REASON}"),
]


def lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "lab.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_short_run_measures_predicts_and_reports(tmp_path: Path) -> None:
    ended = lab("--out", str(tmp_path), "run", "--short")
    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads((tmp_path / "short.json").read_text())
    assert len(result["rows"]) == 10
    for row in result["rows"]:
        assert row["of_line"] < 1.2, "nothing is faster than the line"
        assert row["predicted"] is None or 0.2 < row["predicted"] / row["seconds"] < 5
    assert hosts.left_behind() == []
    told = lab("--out", str(tmp_path), "report")
    assert told.returncode == 0, told.stderr
    page = (tmp_path / "report.html").read_text()
    assert "halving_doubling" in page
    assert 'src="http' not in page, "it needs no network"


def test_what_a_killed_run_leaves_is_found_and_removed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "lab.py"), "--out", str(tmp_path), "run", "--short"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mine = f"ringred-lab-{run.pid}-"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not any(name.startswith(mine + "3") for name in hosts._namespaces()):
        time.sleep(0.05)
    time.sleep(2)  # its ranks have begun
    run.kill()
    run.wait()
    left = [name for name in hosts.left_behind() if name.startswith(mine)]
    assert len(left) == 5
    cleaned = lab("clean")
    assert all(name in cleaned.stdout for name in left)
    assert hosts.left_behind() == []
    assert lab("clean").stdout == "nothing to do\n"
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in processes
