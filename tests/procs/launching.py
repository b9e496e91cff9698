"""Starting real launchers from tests: bounded in time, and nothing of theirs may stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).with_name("programs")

# Ways for processes to find each other: the launcher, and the one transport that it is asked for, if any.
WAYS = {
    "mpi": ("mpirun", {"RINGRED_TRANSPORT": "mpi"}),
    "torch_p2p": ("torchrun", {"RINGRED_TRANSPORT": "torch_p2p"}),
    "shm by mpirun": ("mpirun", {}),
    "shm by torchrun": ("torchrun", {}),
}


class Ended(NamedTuple):
    """How a job ended: exit status, all that it printed, seconds it took, when it was over (of `time.time`), and
    what it left behind: processes, files in /dev/shm."""

    status: int
    output: str
    seconds: float
    at: float
    left_behind: list[str]

    def said(self) -> str:
        """What the ranks printed, without torchrun's account of how they ended: a crash is last."""
        return self.output.partition('bin/torchrun", line')[0]


def launch(
    launcher: str, ranks: int, program: str | Path, *arguments: str, limit: float = 100.0, **variables: str
) -> Ended:
    """Runs `program` on `ranks` ranks by launch/mpirun.sh or launch/torchrun.sh."""
    path = PROGRAMS / program if isinstance(program, str) else program
    command = [str(ROOT / "launch" / f"{launcher}.sh"), str(ranks), str(path), *arguments]
    return run_to_its_end(command, limit, variables)


def launch_plain(program: str | Path, *arguments: str, limit: float = 150.0, **variables: str) -> Ended:
    """Runs `program`, which starts ranks itself."""
    return run_to_its_end(
        [sys.executable, str(PROGRAMS / program if isinstance(program, str) else program), *arguments], limit, variables
    )


def run_to_its_end(command: list[str], limit: float, variables: dict[str, str]) -> Ended:
    """Runs `command`, and looks for what it left behind."""
    token = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "RINGRED_TEST_TOKEN": token,
        "RINGRED_TUNING": "off",
        **variables,
    }
    shared_before = set(os.listdir("/dev/shm"))
    began = time.monotonic()
    job = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = job.communicate(timeout=limit)
    except BaseException as stopped:  # its time is over, or that of the test, or somebody's patience
        output = end(job)
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        raise AssertionError(f"{' '.join(command)} did not end within {limit} s:\n{output.decode()}") from None
    seconds, at = time.monotonic() - began, time.time()
    left = processes_with(token)
    left += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shared_before - mapped_names()]
    return Ended(job.returncode, output.decode(errors="replace").replace("\0", ""), seconds, at, left)


def mistaken(output: str) -> list[str]:
    """The lines in which ranks of `dies.py` say that they raised something else than that rank 1 failed."""
    raised = [line for line in output.splitlines() if " raised " in line and line.startswith("rank")]
    return [line for line in raised if "PeerFailed" not in line or "rank 1" not in line.partition(":")[2]]


def end(job: subprocess.Popen[bytes]) -> bytes:
    """Ends `job` and all of its process group, by force if it must be, and returns what was printed meanwhile."""
    for how, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        if job.returncode is None:  # else its number may be another's
            os.killpg(job.pid, how)
        with suppress(subprocess.TimeoutExpired):
            return job.communicate(timeout=patience)[0]
    return b"(somebody outside its process group still holds its output)"


def processes_with(token: str, patience: float = 3.0) -> list[str]:
    """The command lines of processes started with `token`, once they had `patience` seconds to end."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for directory in Path("/proc").iterdir():
            if not directory.name.isdigit():
                continue
            try:
                if f"RINGRED_TEST_TOKEN={token}".encode() in (directory / "environ").read_bytes():
                    found.append((directory / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        found = [command for command in found if command]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def mapped_names() -> set[str]:
    """The files in /dev/shm that some process still uses: other jobs may run on this machine at the same time."""
    names = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                maps = (directory / "maps").read_text()
            except OSError:
                continue
            names.update(line.partition("/dev/shm/")[2].split()[0] for line in maps.splitlines() if "/dev/shm/" in line)
    return names
