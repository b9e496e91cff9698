"""`ringred run`: ranks that fail are replaced, the others go on, and everything ends with the job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from ringred.testing.command.spare import Spares
from tests.procs.launching import PROGRAMS, ROOT, end, launch, processes_with, run_to_its_end

pytestmark = [pytest.mark.procs, pytest.mark.timeout(240)]

PROGRAM = str(PROGRAMS / "goes_on.py")
COMMAND = [sys.executable, "-m", "ringred.testing.command", "run"]


def ended(output: str) -> list[dict[str, Any]]:
    """What the ranks printed that came to their end."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line for line in lines if "end" in line]


@pytest.mark.parametrize("transport", ["shm", "torch_p2p"])
def test_a_rank_that_is_killed_is_replaced(transport: str) -> None:
    """Two die, the lowest rank first; in the end there are four again, and their weights are the same bits.

    The second may die before another process is there for the first, and both be let in at once.
    """
    faults = ["kill rank 0 at step 20", "kill rank 2 at step 60"]
    job = run_to_its_end(
        [*COMMAND, "--ranks", "4", PROGRAM, "30", "whole", *faults],
        120,
        {"RINGRED_TRANSPORT": transport, "RINGRED_TIMEOUT": "20"},
    )
    assert job.status == 0, job.output[-3000:]
    assert job.left_behind == []
    last = ended(job.output)
    assert sorted(one["end"] for one in last) == [0, 1, 2, 3]
    assert {one["size"] for one in last} == {4}
    assert len({(one["weights"], one["steps"], one["seen"]) for one in last}) == 1, last
    assert all(one["loss"] < 0.1 for one in last), last
    for rank in (0, 2):
        assert f"ringred run: rank {rank} was ended by SIGKILL; another process takes its place" in job.output
    assert "3 ranks go on (4 before)" in job.output
    assert re.search(r"4 ranks go on \([23] before\)", job.output)
    assert max(max(one["recoveries"]) for one in last) < 10


def test_a_rank_that_is_stopped_is_left_out_and_replaced() -> None:
    variables = {"RINGRED_TIMEOUT": "3", "RINGRED_STALL_SECONDS": "1"}
    job = run_to_its_end([*COMMAND, "--ranks", "3", PROGRAM, "6", "whole", "stop rank 1 at step 30"], 120, variables)
    assert job.status == 0, job.output[-3000:]
    assert job.left_behind == []
    assert {one["size"] for one in ended(job.output)} == {3}
    assert "rank 1 may be missing: it is stopped (SIGSTOP)" in job.output
    assert "rank 1 did not take part within the timeout of 3 s" in job.output


def test_where_too_few_are_left_they_wait_for_others() -> None:
    job = run_to_its_end([*COMMAND, "--ranks", "2", "--min", "2", PROGRAM, "6", "kill rank 1 at step 20"], 120, {})
    assert job.status == 0, job.output[-3000:]
    last = ended(job.output)
    assert [one["size"] for one in last] == [2, 2]
    assert last[0]["steps"] == 6 * 50 + 1, "no step of one rank alone but the one that was under way"


@pytest.mark.parametrize(("what", "text"), [("raise", "a bug in the loop"), ("early", "no data here")])
def test_an_error_of_the_program_ends_the_job(what: str, text: str) -> None:
    job = run_to_its_end([*COMMAND, "--ranks", "3", PROGRAM, "5", what], 60, {"RINGRED_TIMEOUT": "20"})
    assert job.status == 1
    assert job.left_behind == []
    assert job.output.rstrip().splitlines()[-1] == f"ValueError: {text}", "its traceback is last"
    lines = [json.loads(line) for line in job.output.splitlines() if line.startswith("{")]
    assert job.at - min(line["raises"] for line in lines if "raises" in line) < 20, (
        "however long processes take to start"
    )


def test_a_job_whose_replacements_all_fail_is_given_up(tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    gone = "if os.environ['RINGRED_JOINS'] == '1': raise ImportError('gone by now')"
    program.write_text(f"import os\n{gone}\nexec(open({PROGRAM!r}).read())\n")
    job = run_to_its_end(
        [*COMMAND, "--ranks", "3", "--restarts", "2", str(program), "40", "kill rank 1 at step 10"], 60, {}
    )
    assert job.status == 0, "the others went on to their end"
    assert {one["size"] for one in ended(job.output)} == {2}
    assert job.left_behind == []
    assert "3 processes failed one after the other: rank 1 is not replaced" in job.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_ranks_end_with_their_supervisor(number: signal.Signals) -> None:
    token = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RINGRED_TUNING": "off",
        "RINGRED_TEST_TOKEN": token,
    }
    job = subprocess.Popen(
        [*COMMAND, "--ranks", "2", PROGRAM, "1000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert job.stdout is not None
        while b'"size"' not in job.stdout.readline():
            assert job.poll() is None
        job.send_signal(number)
        job.communicate(timeout=20)
        assert job.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        assert processes_with(token, patience=10) == []
    finally:
        if job.poll() is None:
            end(job)


def test_two_hosts_meet_at_a_third(tmp_path: Path) -> None:
    """Of a job of two commands, as on two hosts: a rank of one is killed; and nobody without the secret is let in."""
    secret = tmp_path / "secret"
    meet = subprocess.Popen(
        [sys.executable, "-m", "ringred.testing.command", "meet", "--listen", "127.0.0.1:0", "--secret", str(secret)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert meet.stdout is not None
        address = meet.stdout.readline().split()[-1]
        command = [*COMMAND, "--ranks", "2", "--hosts", "2", "--meet", address, "--secret"]
        wrong = tmp_path / "wrong"
        wrong.touch(0o600)
        wrong.write_text("ab" * 32)
        refused = run_to_its_end([*command, str(wrong), PROGRAM, "1"], 30, {})
        assert refused.status == 2
        assert "nobody who knows the job's secret keeps a rendezvous at" in refused.output
        wrong.chmod(0o644)
        refused = run_to_its_end([*command, str(wrong), PROGRAM, "1"], 30, {})
        assert "other users may read this secret" in refused.output
        variables = {"RINGRED_INTERFACE": "127.0.0.1", "OMP_NUM_THREADS": "1", "RINGRED_TUNING": "off"}
        arguments = [*command, str(secret), PROGRAM, "6", "whole", "kill rank 3 at step 30"]
        jobs = [
            subprocess.Popen(
                arguments,
                env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for _ in range(2)
        ]
        outputs = [job.communicate(timeout=100)[0] for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], outputs
        last = ended("\n".join(outputs))
        assert sorted(one["end"] for one in last) == [0, 1, 2, 3]
        assert len({one["weights"] for one in last}) == 1
    finally:
        meet.send_signal(signal.SIGINT)
        meet.communicate(timeout=20)
    assert meet.returncode == 0


def test_a_rank_of_torchrun_that_wakes_after_the_others_have_gone_does_not_go_on_alone() -> None:
    job = launch("torchrun", 3, "wakes.py", limit=60, RINGRED_TIMEOUT="1")
    said = sorted(
        (json.loads(line) for line in job.output.splitlines() if line.startswith("{")), key=lambda one: int(one["was"])
    )
    assert [one["size"] for one in said] == [2, 2, 0], job.output[-3000:]
    assert said[2]["why"] == "rank 2 of world was left out by those who went on: rank 0, rank 1"
    assert job.left_behind == []


@pytest.mark.parametrize("transport", ["shm", "mpi"])
def test_ranks_shrink_under_an_mpirun_that_lets_them(transport: str) -> None:
    """By default mpirun ends the job when a rank dies. Over MPI, ringred's own messages tell of the death."""
    variables = {"RINGRED_TRANSPORT": transport, "MPIRUN_ARGS": "--enable-recovery", "RINGRED_TIMEOUT": "60"}
    job = launch("mpirun", 4, "shrinks.py", limit=60, **variables)
    said = [json.loads(line) for line in job.output.splitlines() if line.startswith("{")]
    assert sorted((one["rank"], one["size"], one["sum"]) for one in said) == [(0, 3, 3.0), (1, 3, 3.0), (2, 3, 3.0)]
    # None waits for the others in `MPI_Finalize`, which would hang at times.
    assert {(one["from"], one["to"], one["waits"]) for one in said} == {(transport, "shm", False)}
    assert all("rank 1" in one["why"] for one in said)
    assert job.left_behind == []


def test_the_example_goes_on_from_its_checkpoint_with_other_ranks(tmp_path: Path) -> None:
    program = str(ROOT / "examples" / "train_elastic.py")
    folder = tmp_path / "checkpoints"
    for ranks, epochs in ((3, "4"), (2, "10")):
        command = [*COMMAND, "--ranks", str(ranks), program, "--epochs", epochs, "--checkpoints", str(folder)]
        job = run_to_its_end(command, 100, {})
        assert job.status == 0, job.output[-3000:]
        assert job.left_behind == []
    lines = [line for line in job.output.splitlines() if line.startswith("epoch")]
    assert [int(line.split()[1].rstrip(":")) for line in lines] == list(range(4, 10))
    assert float(lines[-1].split()[-1]) > 0.9
    assert sorted(path.name for path in folder.iterdir()) == ["step-8", "step-9"]


_ASKS = """\
import sys
loaded = "torch" in sys.modules
import inspect, json, os
import beside
def annotated(x: int): pass
place = inspect.currentframe().f_code.co_filename
known = annotated.__annotations__["x"] is int, sys.modules["__main__"].annotated is annotated, __name__, os.getcwd()
found = {"as": [__file__, place, sys.argv, sys.path[0], beside.here, *known, os.environ["RANK"]], "loaded": loaded}
print(json.dumps(found), file=sys.stderr)
raise SystemExit(3)
"""


def test_a_spare_runs_a_script_as_python_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "asks.py").write_text(_ASKS)
    (tmp_path / "there" / "beside.py").write_text("here = 'beside it'")
    (tmp_path / "beside.py").write_text("here = 'where one is'")
    (tmp_path / "link.py").symlink_to(tmp_path / "there" / "asks.py")
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told: list[str] = []
    spares = Spares(
        2, ["link.py", "--an", "argument"], environment, lambda: None, lambda text, facts: told.append(text)
    )
    plain = [sys.executable, "link.py", "--an", "argument"]
    with subprocess.Popen(plain, env={**environment, "RANK": "1"}, stderr=subprocess.PIPE) as process:
        expected = json.loads(process.communicate()[1])
    spares.keep()
    dies, _ = spares._ready[0]
    dies.kill()
    dies.wait()
    spares.keep()
    assert told == ["one spare process fewer: it ended with status -9"]
    spare = spares.take({"RANK": "1"})
    assert spare is not None
    found = json.loads(spare.communicate(timeout=60)[1])
    assert spare.returncode == 3
    assert found["as"] == expected["as"]
    assert (found["loaded"], expected["loaded"]) == (True, False)
    assert spares.take({"RANK": "2"}) is None
    spares.end()


def test_a_spare_takes_the_place_of_the_dead_and_it_is_told_as_json() -> None:
    options = ["--ranks", "2", "--spares", "1", "--json"]
    job = run_to_its_end([*COMMAND, *options, PROGRAM, "20", "whole", "kill rank 1 at step 900"], 100, {})
    assert job.status == 0, job.output[-3000:]
    last = ended(job.output)
    assert {one["size"] for one in last} == {2}
    assert len({one["weights"] for one in last}) == 1
    told = [json.loads(line) for line in job.output.splitlines() if line.startswith('{"ringred": "run"')]
    assert [(one["event"], one["rank"], one["status"]) for one in told] == [("replaced", 1, -signal.SIGKILL)]
    assert told[0]["text"] == "rank 1 was ended by SIGKILL; a spare process takes its place"
    assert job.left_behind == []
