"""The laboratory: a short run from the command, each kind of experiment on few hosts, and what a killed run leaves."""

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

from tests.procs.launching import ROOT, mapped_names, processes_with

sys.path.insert(0, str(ROOT / "benchmarks"))

from lab import hosts, running
from lab.cases import Case, Experiment
from lab.hosts import Hosts
from lab.network import Network
from lab.profiles import read

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


BYTES = {"ring": 1.5, "gloo": 1.5, "servers:sync": 2, "servers:async": 2, "hosts:sync": 1, "hosts:async": 1}
"""What each of two hosts of two ranks sends, in models."""


def test_training_steps_are_measured_and_predicted(tmp_path: Path) -> None:
    """Of a model of 0.2 s, so that what the two cores do beside is little of it."""
    ways = ("alone", *BYTES, "server:async", "servers:k_async:2", "servers:k_sync:2")
    cases = [Case("graph", way, 9.0) for way in ways]
    cases += [Case("graph", way, 9.0, slowness=2.0, label="slow") for way in ("ring", "servers:k_sync:2")]
    experiment = Experiment("", (Network(2, 1000, each=2),), "torch", cases=lambda network: cases, steps=2)
    found = running.run("two-hosts", experiment, tmp_path)["rows"]
    assert [(row["way"], row["label"]) for row in found] == [(case.way, case.label) for case in cases]
    rows = {f"{row['way']} {row['label']}".strip(): row for row in found}
    model = read("graph")
    alone = 9.0 * model.seconds
    for way, row in rows.items():
        assert row["seconds"] >= 0.98 * alone * (2 if way == "ring slow" else 1), row
        assert (row["predicted"] is None) == (way == "gloo")
        assert row["predicted"] is None or 0.4 < row["predicted"] / row["seconds"] < 2, row
    for way, models in BYTES.items():  # with the frames' heads; asynchronous ones may do more or fewer meanwhile
        usual = 1.05 * models * model.nbytes
        assert rows[way]["sent"] == pytest.approx(usual, rel=0.6 if way.endswith("async") else 0.25), rows[way]
    slow, usual = (rows[f"servers:k_sync:2{label}"]["seconds"] for label in (" slow", ""))
    assert slow < 1.5 * usual, "the first two do not wait for the others"


def test_what_was_measured_before_ranks_fail_is_kept(tmp_path: Path) -> None:
    cases = [Case("graph", "ring"), Case("graph", "no_such_way"), Case("graph", "ring")]
    experiment = Experiment("", (Network(2, 1000),), "torch", cases=lambda network: cases, steps=1)
    complete = tmp_path / "two-hosts.json"
    complete.write_text("{}")
    result = running.run("two-hosts", experiment, tmp_path)
    (row,) = result["rows"]
    assert 0.2 < row["predicted"] / row["seconds"] < 5
    (why,) = result["failed"]
    assert why == "2 hosts of 1000 Mbit/s: exit statuses [1, 1]"
    assert json.loads(complete.with_suffix(".failed").read_text()) == result
    assert complete.read_text() == "{}", "what was there stays"


def test_a_real_model_is_trained(tmp_path: Path) -> None:
    experiment = Experiment("", (Network(2, 1000),), "torch", ("servers:sync",), trainings=("digits",))
    (row,) = running.run("digits", experiment, tmp_path)["rows"]
    assert row["quality"] > 0.9


def test_mpi_and_gloo_connect_the_hosts_of_two_racks_in_one_job(tmp_path: Path) -> None:
    program = tmp_path / "both.py"
    program.write_text(BOTH)
    with Hosts(Network(4, 400, racks=2, uplink_mbit=40)) as racks:
        (said,) = racks.mpi_ranks(program, PYTHONPATH=ROOT, RINGRED_TUNING="off")
    (line,) = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert line["hosts"] == [0, 1, 2, 3]
    assert line["transport"] == "mpi"
    assert line["sums"] == [10.0] * 3
    # All of a rank of each rack passes its rack's uplink once at least, whatever adds it up.
    for seconds in line["seconds"]:
        assert seconds > 0.9 * (1 << 20) / Network(2, 40).bytes_per_second, line


BOTH = """
import json, time
import torch, torch.distributed as dist
from mpi4py import MPI
import ringred

comm = ringred.init()
dist.init_process_group("gloo", rank=comm.rank, world_size=comm.size)
ways = [
    lambda tensor: comm.all_reduce(tensor, algorithm="torus"),
    lambda tensor: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, tensor.numpy()),
    dist.all_reduce,
]
sums, seconds = [], []
for way in ways:
    for attempt in range(2):  # the first one connects
        tensor = torch.full((1 << 18,), comm.rank + 1.0)
        comm.barrier()
        began = time.perf_counter()
        way(tensor)
        comm.barrier()
        took = time.perf_counter() - began
    sums.append(tensor.mean().item())
    seconds.append(took)
if comm.rank == 0:
    print(json.dumps({"hosts": comm.hosts, "transport": comm.transport.name, "sums": sums, "seconds": seconds}))
dist.destroy_process_group()
comm.close()
"""


@pytest.mark.parametrize("experiment", ["--short", "reduce-4-mpi"])
def test_what_a_killed_run_leaves_is_found_and_removed(tmp_path: Path, experiment: str) -> None:
    before = set(os.listdir("/dev/shm"))
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
    assert set(os.listdir("/dev/shm")) - before - mapped_names() == set()
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
