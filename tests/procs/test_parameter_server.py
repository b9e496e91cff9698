"""A parameter server between processes: workers and servers that are killed, servers of their own, and DDP's bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.procs.launching import ROOT, launch, launch_plain

pytestmark = [pytest.mark.procs, pytest.mark.timeout(240)]


def test_workers_are_killed_and_every_update_is_made_once() -> None:
    ended = launch_plain("ps_workers_killed.py", "20", "1")
    assert ended.status == 0, ended.output[-3000:]
    assert "20 workers killed: every update once" in ended.output
    assert ended.left_behind == []


def test_servers_are_killed_and_their_copies_go_on() -> None:
    ended = launch_plain("ps_servers_killed.py", "10", "1")
    assert ended.status == 0, ended.output[-3000:]
    assert "10 servers killed: every update once" in ended.output
    assert ended.left_behind == []


def test_servers_and_workers_in_ranks_that_are_processes() -> None:
    """Shared memory and messages between processes; Sync comes to DDP's bits."""
    for launcher in ("mpirun", "torchrun"):
        ended = launch(launcher, 3, "ps_in_ranks.py")
        assert ended.status == 0, ended.output[-3000:]
        assert ended.output.count("equal to the bit") == 3
        assert ended.left_behind == []


def test_the_example_trains_under_a_policy(tmp_path: Path) -> None:
    found = tmp_path / "digits.json"
    example = ROOT / "examples" / "train_digits.py"
    ended = launch("torchrun", 2, example, "--policy", "k_async:1", "--json", str(found))
    assert ended.status == 0, ended.output[-3000:]
    result = json.loads(found.read_text())
    assert result["accuracy"] >= 0.96
    assert result["policy"] == "k_async:1"
    assert 0 < result["mean_staleness"] < 2
    assert ended.left_behind == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--workers", "2", "--policy", "k_sink:2", "--folder", "x"],
            "no policy is called 'k_sink' (did you mean 'k_sync'?); there are",
        ),
        (["--workers", "2", "--policy", "k_sync:3", "--folder", "x"], "KSync(3) needs 3 workers, and there are 2"),
        (["--workers", "2"], "servers meet in a folder, or at addresses that are all given"),
        (["--workers", "2", "--number", "2", "--folder", "x"], "number 2 of 1 shards; expected 0 to 0"),
        (["--workers", "2", "--addresses", "tcp://127.0.0.1:1"], "--keys has to name a file of keys"),
    ],
)
def test_serve_refuses_in_a_sentence(arguments: list[str], said: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("ringred")), "serve", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("ringred: ")
    assert said in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_ended_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """Without a copy its workers cannot go on, and say why."""
    command = [str(Path(sys.executable).with_name("ringred")), "serve", "--workers", "1", "--folder", str(tmp_path)]
    program = [sys.executable, str(ROOT / "tests" / "procs" / "programs" / "ps_waits.py"), str(tmp_path)]
    quiet = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE) as killed:  # what it leaves in the folder misleads nobody
        assert killed.stdout is not None
        assert b"listens on" in killed.stdout.readline()
        killed.kill()
    assert len(list(tmp_path.iterdir())) == 2
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as server,
        subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=quiet) as worker,
    ):
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "pulled\n"
            server.send_signal(signal.SIGTERM)
            said, _ = worker.communicate(timeout=60)
            assert "PeerFailed: worker 0: server 0 at tcp://127.0.0.1:" in said
            assert "is gone: it was ended" in said
            assert server.wait(timeout=30) == 0
        finally:
            worker.kill()
            server.kill()
    assert list(tmp_path.iterdir()) == []
