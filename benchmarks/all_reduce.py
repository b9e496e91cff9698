"""Collectives of ringred and of everything else one could use on this host, in one run.

    python benchmarks/all_reduce.py --ranks 2 --systems ringred,gloo,mpi,deepspeed --json out.json --plot out.png

Every rank rewrites its buffer before each call and reads it afterwards, as a training step does; `time` is
that of the call alone (on the slowest rank), `whole` includes writing and reading. All systems run in the same
minutes: the processes of all exist side by side, but only one system is awake at a time; all are pinned alike and use
the same barrier. Each start gives the median of its calls; a figure is the median over `--starts` separate starts, low
and high are the least and the greatest of them. Every element of every result is checked.

`SYSTEM@PYTHON` runs a peer from another environment: `mpi@/opt/mpich/bin/python`. `limit` is not a system: all
ranks at once copy as many bytes as the collective must move, each in its own memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from all_reduce_report import BUS, Row, plot, ratios, table
from harness import context, write_json
from peers import SYSTEMS

from ringred.runtime.config import mpirun_environment
from ringred.testing.ports import reserved_port

HERE = Path(__file__).parent
PATIENCE = 120.0  # seconds that one order may take


class Group:
    """The processes of one system, one per rank, each with a connection."""

    def __init__(self, spec: str, ranks: int, folder: Path, number: int, port: int) -> None:
        self.spec, self.ranks = spec, ranks
        self.name, _, python = spec.partition("@")
        self.python = python or sys.executable
        self.label, self.memories, self.settings, self.absent = self.name, ["tensor"], "", ""
        self.path, self.barrier = folder / f"s{number}", folder / f"b{number}"
        self.barrier.write_bytes(bytes(64 * ranks))
        self.connections: list[Any] = []
        self.port = port
        self.processes: list[subprocess.Popen[bytes]] = []
        self.output = (folder / f"out{number}").open("w+b")

    def start(self) -> None:
        if not Path(self.python).exists():
            self.absent = f"no {self.python}"
            return
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(self.ranks)
        listener.settimeout(PATIENCE)
        worker = [self.python, str(HERE / "peers.py"), self.name.partition("-")[0]]
        worker += [str(self.path), str(self.barrier), str(self.ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.name in ("mpi", "ringred-mpi"):
            mpirun = Path(self.python).with_name("mpirun")
            if not mpirun.exists():
                self.absent = f"no mpirun beside {self.python}"
                return
            chosen = {k: v for k, v in os.environ.items() if k.startswith(("OMPI_MCA_", "I_MPI_", "MPIR_", "FI_"))}
            chosen |= {"I_MPI_PIN": "0"}  # all systems are pinned alike
            if self.ranks > len(os.sched_getaffinity(0)):
                chosen |= {"OMPI_MCA_mpi_yield_when_idle": "1", "I_MPI_THREAD_YIELD": "1"}
            environment = mpirun_environment(environment) | chosen | {"PATH": f"{mpirun.parent}:{os.environ['PATH']}"}
            environment["RINGRED_BENCH_SETTINGS"] = json.dumps(chosen)
            bind = ["--bind-to", "none"] if "open" in version(mpirun).lower() else []
            self._spawn([str(mpirun), *bind, "-n", str(self.ranks), *worker], environment)
        else:
            for rank in range(self.ranks):
                own = {"RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_SIZE": str(self.ranks)}
                own |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
                self._spawn([*worker, str(rank)], environment | own)
        for _ in range(self.ranks):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                self.absent = f"did not start: {self.said()}"
                return
            self.connections.append(connection.makefile("rw"))
        hellos = [self._hear(connection) for connection in self.connections]
        self.absent = next((hello["absent"] for hello in hellos if "absent" in hello), "")
        if not self.absent:
            self.label = hellos[0]["label"] + self.name.removeprefix(self.name.partition("-")[0])
            self.memories, self.settings = hellos[0]["memories"], hellos[0]["settings"]

    def _spawn(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.processes.append(subprocess.Popen(command, env=environment, stdout=self.output, stderr=self.output))

    def said(self) -> str:
        """The end of what its processes printed."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")[-500:]

    def _hear(self, connection: Any) -> dict[str, Any]:
        line = connection.readline()
        if not line:
            raise SystemExit(f"a rank of {self.spec} died: {self.said()}")
        return dict(json.loads(line))

    def order(self, **order: Any) -> list[dict[str, Any]]:
        """Sends one order to every rank and returns their answers."""
        for connection in self.connections:
            connection.write(json.dumps(order) + "\n")
            connection.flush()
        return [self._hear(connection) for connection in self.connections]

    def stop(self) -> None:
        for connection in self.connections:
            try:
                connection.write('{"end": true}\n')
                connection.flush()
            except OSError:
                continue
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.output.close()
        if self.name == "deepspeed":
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
                left.unlink()  # DeepSpeed does not remove it


def version(mpirun: Path) -> str:
    """The version text of an mpirun."""
    return subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout


@contextmanager
def groups(specs: Sequence[str], ranks: int) -> Iterator[list[Group]]:
    """All systems, started and waiting for orders."""
    folder = Path(tempfile.mkdtemp(prefix="ringred-bench-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        started = []
        for number, spec in enumerate(specs):
            group = Group(spec, ranks, folder, number, stack.enter_context(reserved_port()))
            stack.callback(group.stop)
            group.start()
            started.append(group)
        yield started


def bytes_of(text: str) -> int:
    """4, 16K, 1M: units of 1024."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"a size is like 4, 16K or 1M, got {text!r}")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2].upper()]


def iterations_for(nbytes: int) -> int:
    """The number of calls in a turn: more for small messages."""
    return max(2, min(60, (32 << 20) // max(nbytes, 1)))


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """The rows, the systems that are absent with the reason, and the settings of those that have some."""
    samples: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    known: dict[tuple[str, str, int], tuple[str, str, int]] = {}
    absent: dict[str, str] = {}
    settings: dict[str, str] = {}
    for start in range(arguments.starts):
        with groups(arguments.systems, arguments.ranks) as systems:
            for group in systems:
                if group.absent:
                    absent[group.spec] = group.absent
                if group.settings:
                    settings[group.label] = group.settings
            present = [group for group in systems if not group.absent]
            for nbytes in arguments.sizes:
                calls: dict[tuple[str, str, int], list[float]] = {}
                wholes: dict[tuple[str, str, int], list[float]] = {}
                for turn in range(arguments.rounds):
                    for group in present:
                        for memory in group.memories:
                            key = (group.label, memory, nbytes)
                            answers = group.order(
                                collective=arguments.collective,
                                algorithm=arguments.algorithm,
                                dtype=arguments.dtype,
                                bytes=nbytes,
                                memory=memory,
                                warm_up=3,
                                iterations=iterations_for(nbytes),
                                turn=turn,
                            )
                            trouble = next((a["unsupported"] for a in answers if "unsupported" in a), None)
                            if trouble is not None:
                                absent[f"{group.label} {arguments.dtype} {arguments.collective}"] = trouble
                                continue
                            calls.setdefault(key, []).extend(map(max, zip(*(a["calls"] for a in answers), strict=True)))
                            wholes.setdefault(key, []).extend(
                                map(max, zip(*(a["wholes"] for a in answers), strict=True))
                            )
                            wrong = sum(a["wrong"] for a in answers) + known.get(key, ("", "", 0))[2]
                            known[key] = (answers[0]["algorithm"], answers[0]["transport"], wrong)
                for key, values in calls.items():
                    pair = (statistics.median(values) * 1e6, statistics.median(wholes[key]) * 1e6)
                    samples.setdefault(key, []).append(pair)
                print(f"start {start + 1}: {nbytes} bytes", file=sys.stderr, flush=True)
    rows = []
    for (system, memory, nbytes), pairs in samples.items():
        times = [time for time, _ in pairs]
        algorithm, transport, wrong = known[system, memory, nbytes]
        rows.append(
            Row(
                system,
                algorithm,
                transport,
                memory,
                nbytes,
                statistics.median(times),
                min(times),
                max(times),
                statistics.median(whole for _, whole in pairs),
                wrong,
            )
        )
    return sorted(rows, key=lambda row: (row.nbytes, row.time)), absent, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", default="4,1K,16K,64K,256K,1M,4M,16M,25M,128M")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--systems", default="ringred,gloo,mpi,deepspeed")
    parser.add_argument("--collective", choices=sorted(BUS), default="all_reduce")
    parser.add_argument("--algorithm", default="auto", help="ringred's")
    parser.add_argument("--starts", type=int, default=3, help="separate starts of all processes")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system at each size, a start")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    arguments.sizes = [bytes_of(text) for text in arguments.sizes.split(",")]
    arguments.systems = [*arguments.systems.split(","), "limit"]
    unknown = {spec.partition("@")[0] for spec in arguments.systems} - {*SYSTEMS, "ringred-mpi"}
    if unknown:
        parser.error(f"--systems: {', '.join(sorted(unknown))}: there are {', '.join([*SYSTEMS, 'ringred-mpi'])}")

    rows, absent, settings = measure(arguments)
    print(table(rows, arguments))
    print(f"\nTimes longer than ringred:\n{ratios(rows)}")
    for name, reason in absent.items():
        print(f"absent: {name}: {reason.strip().splitlines()[-1] if reason.strip() else 'no reason given'}")
    for name, text in settings.items():
        print(f"settings of {name}: {text}")
    limits = {row.nbytes: row.nbytes / row.time / 1e3 for row in rows if row.system == "limit"}
    if arguments.json:
        bus = BUS[arguments.collective](arguments.ranks)
        result = context() | {
            "limit_GBps": limits[max(limits)],
            "limits_GBps": {str(nbytes): value for nbytes, value in limits.items()},
            "absent": absent,
            "settings": settings,
            "rows": [
                {
                    "system": row.system,
                    "collective": arguments.collective,
                    "algorithm": row.algorithm,
                    "transport": row.transport,
                    "memory": row.memory,
                    "ranks": arguments.ranks,
                    "dtype": arguments.dtype,
                    "bytes": row.nbytes,
                    "time_us": row.time,
                    "time_us_low": row.low,
                    "time_us_high": row.high,
                    "whole_us": row.whole,
                    "algbw_GBps": row.nbytes / row.time / 1e3,
                    "busbw_GBps": row.nbytes / row.time / 1e3 * bus,
                    "wrong": row.wrong,
                }
                for row in rows
            ],
        }
        result["command"] = "python benchmarks/all_reduce.py " + shlex.join(sys.argv[1:])
        write_json(arguments.json, result)
    if arguments.plot:
        plot(rows, arguments, arguments.plot)
    if any(row.wrong for row in rows):
        raise SystemExit("wrong results")


if __name__ == "__main__":
    main()
