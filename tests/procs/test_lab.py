"""The laboratory's hosts: a short run from the command, and what a killed one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.procs.launching import ROOT, processes_with

sys.path.insert(0, str(ROOT / "benchmarks"))

from lab import hosts

REASON = hosts.unavailable()
pytestmark = [
    pytest.mark.procs,
    pytest.mark.timeout(150),
    pytest.mark.skipif(REASON is not None, reason=f"no hosts here: {REASON}"),
]


def lab(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "lab.py"), *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


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


@pytest.mark.parametrize("experiment", ["--short", "reduce-4-mpi"])
def test_what_a_killed_run_leaves_is_found_and_removed(tmp_path: Path, experiment: str) -> None:
    run, token = started(tmp_path, experiment)
    run.kill()
    run.wait()
    left = [name for name in hosts.left_behind() if f"-{run.pid}." in name]
    assert len(left) == 5
    assert len(ranks(token)) >= 4, "killing a run leaves its ranks"
    assert list(tmp_path.glob("ringred-lab-*"))
    cleaned = lab("clean", TMPDIR=str(tmp_path))
    assert cleaned.returncode == 0, cleaned.stderr
    assert all(name in cleaned.stdout for name in left)
    assert hosts.left_behind() == []
    assert processes_with(token) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert lab("clean", TMPDIR=str(tmp_path)).stdout == "nothing to do\n"


def test_a_run_that_is_told_to_end_removes_its_hosts_itself(tmp_path: Path) -> None:
    run, token = started(tmp_path, "--short")
    run.terminate()
    assert run.wait(timeout=30) == 128 + signal.SIGTERM
    assert processes_with(token) == []
    assert [name for name in hosts.left_behind() if f"-{run.pid}." in name] == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def started(folder: Path, experiment: str) -> tuple[subprocess.Popen[bytes], str]:
    """A run whose four ranks have begun and whose temporary files are in `folder`, and the token by which its processes
    are found."""
    token = uuid.uuid4().hex
    environment = {**os.environ, "RINGRED_TEST_TOKEN": token, "TMPDIR": str(folder)}
    command = [sys.executable, str(ROOT / "benchmarks" / "lab.py"), "--out", str(folder / "out"), "run", experiment]
    devices = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(command, env=environment, **devices)
    deadline = time.monotonic() + 60
    while len(ranks(token)) < 4:
        assert time.monotonic() < deadline, "no ranks"
        time.sleep(0.05)  # nothing tells the test of the ranks of a run that it did not start itself
    return run, token


def ranks(token: str) -> list[str]:
    """The ranks' own command lines, without those that start them."""
    running = processes_with(token, patience=0.0)
    return [command for command in running if command.split()[1:2] and command.split()[1].endswith("reduce_ranks.py")]
