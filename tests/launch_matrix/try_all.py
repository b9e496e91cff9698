"""Starts a training, and ranks of which one is killed, in every way that there is, and says what came of each.

    python tests/launch_matrix/try_all.py --mpi MPICH/bin/mpirun INTEL/bin/mpirun --json out/launch-matrix.json

Ways: the mpirun of this environment and those of others (each beside a Python with mpi4py, torch and ringred),
torchrun, `ringred run`; as this user and, if that is root, as nobody; with /dev/shm as it is and, as root, with 64 MiB
of it; with as many ranks as cores and with more. The exit status is 1 if one of them fails, hangs, or leaves something.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

ROOT = Path(__file__).parents[2]
sys.path.insert(1, str(ROOT))  # where the package of the tests is

from tests.procs.launching import PROGRAMS, Ended, mistaken, run_to_its_end  # noqa: E402

HERE = Path(sys.executable).parent
LEFT = 'ls -A /dev/shm | sed "s|^|left in the small /dev/shm: |"'
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
SMALL = ["unshare", "--mount", "sh", "-c"]
SMALL += [f'mount -t tmpfs -o size=64m,mode=1777 tmpfs /dev/shm && "$@"; s=$?; sleep 1; {LEFT}; exit $s', "sh"]
LIMIT = 120.0
THEIRS = ("mpich_shm_", "torchinductor_", "torchelastic_")  # MPICH's, where a rank was killed; torch's cache and logs
KILLED = ("signal 9", "SIGKILL", "SIGNAL: 9", "exitcode  : -9")  # how launchers say it


class Way(NamedTuple):
    """One way to start ranks."""

    launcher: str
    mpirun: Path | None
    nobody: bool
    small: bool
    ranks: int

    def command(self, *program: str) -> list[str]:
        """What starts `program`."""
        before = (SMALL if self.small else []) + (NOBODY if self.nobody else [])
        if self.launcher == "ringred run":
            return [*before, str(HERE / "ringred"), "run", "--ranks", str(self.ranks), "--restarts", "0", *program]
        script = "mpirun" if self.mpirun else "torchrun"
        return [*before, str(ROOT / "launch" / f"{script}.sh"), str(self.ranks), *program]

    def environment(self, home: str) -> dict[str, str]:
        """Its variables."""
        path = f"{self.mpirun.parent if self.mpirun else HERE}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": home, "TMPDIR": f"{home}/tmp", "RINGRED_TIMEOUT": "20"}


def library(mpirun: Path) -> str:
    """The MPI whose mpirun this is, as the Python beside it finds it."""
    python = mpirun.with_name("python")
    if not mpirun.exists() or not python.exists():
        raise SystemExit(f"{mpirun}: expected an mpirun, and a python beside it")
    asks = "from ringred.transports.mpi import library; print(library())"
    environment = {**os.environ, "PATH": f"{mpirun.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    said = subprocess.run([python, "-c", asks], env=environment, check=True, capture_output=True, text=True).stdout
    return said.partition(",")[0].strip()


def ways(mpiruns: list[Path], ranks: list[int]) -> Iterator[Way]:
    """All that can be tried here."""
    paths = [HERE / "mpirun", *(path.absolute() for path in mpiruns)]
    every: list[tuple[str, Path | None]] = [*((library(path), path) for path in paths)]
    every += [("torchrun", None), ("ringred run", None)]
    root = (False, True) if os.geteuid() == 0 else (False,)
    for (launcher, mpirun), nobody, small, count in product(every, root, root, ranks):
        yield Way(launcher, mpirun, nobody, small, count)


def trained(way: Way, home: str, accuracies: dict[int, float]) -> str:
    """What is wrong with a training, if anything is. As many ranks reach the same accuracy, whatever started them."""
    found = Path(home) / "digits.json"
    program = [str(ROOT / "examples" / "train_digits.py"), "--epochs", "6", "--json", str(found)]
    ended = run_to_its_end(way.command(*program), LIMIT, way.environment(home))
    if ended.status:
        return f"status {ended.status}: {ended.output[-1500:]}"
    result = json.loads(found.read_text())
    if result["ranks"] != way.ranks or result["accuracy"] != accuracies.setdefault(way.ranks, result["accuracy"]):
        return f"{result['ranks']} ranks, accuracy {result['accuracy']}, others {accuracies}"
    return left(ended, home)


def died(way: Way, home: str) -> str:
    """What is wrong with how a job ends of which one rank is killed, if anything is."""
    ended = run_to_its_end(way.command(str(PROGRAMS / "dies.py"), "killed"), LIMIT, way.environment(home))
    if ended.output.count("is at work") != way.ranks:
        return f"not all began: {ended.output[-1500:]}"
    told = any(words in ended.output for words in ("raised PeerFailed", *KILLED))
    if ended.status == 0 or mistaken(ended.output) or not told:
        return f"status {ended.status}: {ended.output[-1500:]}"
    return left(ended, home)


def left(ended: Ended, home: str) -> str:
    """What was left behind: processes, shared memory, files."""
    found = ended.left_behind + [line for line in ended.output.splitlines() if line.startswith("left in the small")]
    found += os.listdir(f"{home}/tmp")
    found = [each for each in found if not any(name in each for name in THEIRS)]
    return f"left behind: {found}" if found else ""


def tried(task: Callable[..., str], way: Way, *arguments: Any) -> str:
    """What `task` finds wrong, which may be that it does not end; "yes" if nothing is."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "tmp").mkdir()
        for folder in (home, f"{home}/tmp"):
            os.chmod(folder, 0o777)
        try:
            return task(way, home, *arguments) or "yes"
        except AssertionError as failure:
            return str(failure)[:1500]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpi", type=Path, nargs="*", default=[], help="the mpirun of other environments")
    parser.add_argument("--ranks", type=int, nargs="+", default=sorted({max(2, len(os.sched_getaffinity(0))), 6}))
    parser.add_argument("--json", type=Path, help="write what came of each way")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    accuracies: dict[int, float] = {}
    for way in ways(options.mpi, options.ranks):
        row: dict[str, Any] = {
            "launcher": way.launcher,
            "user": "nobody" if way.nobody else "root" if os.geteuid() == 0 else "this one",
            "/dev/shm": "64 MiB" if way.small else "as it is",
            "ranks": way.ranks,
            "trains": tried(trained, way, accuracies),
            "ends when one is killed": tried(died, way),
        }
        print(row, flush=True)
        rows.append(row)
    print(tabulate([{key: str(value)[:60] for key, value in row.items()} for row in rows], headers="keys"))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row[key] != "yes" for row in rows for key in ("trains", "ends when one is killed")))


if __name__ == "__main__":
    main()
