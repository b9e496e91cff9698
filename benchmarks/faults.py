"""What failures cost: how long until the next step, what a training with many of them loses, what the checks cost when
nothing fails.

python benchmarks/faults.py recovery    # from the death of a rank to the next step, and to the one with a new rank
python benchmarks/faults.py torchrun    # the same training by torch's DDP on Gloo, whose ranks torchrun starts anew
python benchmarks/faults.py torchft     # the same under torchft, of the Python that TORCHFT_PYTHON names
python benchmarks/faults.py chaos       # ten minutes with a failure every 5 s on average, and some undisturbed
python benchmarks/faults.py cost        # a step with on_failure="shrink" and without, in the same run
python benchmarks/faults.py kills       # 300 ranks killed at random moments: when the others raise

Each prints a table and writes out/faults-NAME.json. `--short` is a few seconds of each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import Spread, context, write_json
from tabulate import tabulate
from tqdm import tqdm

from ringred.testing.ports import reserved_port

ROOT = Path(__file__).parents[1]
RANKS_PROGRAM = str(Path(__file__).with_name("faults_ranks.py"))
KILLS = 12  # of each kind
RUN = [sys.executable, "-m", "ringred.testing.command", "run"]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RINGRED_TUNING": "off", **variables}


class Records:
    """What all processes of a job write, line by line; `read` goes on where it ended the last time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[dict[str, Any]] = []
        self._read: dict[Path, int] = {}

    def read(self) -> None:
        fresh = []
        for path in self.folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")  # the last line may be half written
            self._read[path] = self._read.get(path, 0) + len(whole + newline)
            fresh += [json.loads(line) for line in whole.splitlines()]
        self.all += sorted(fresh, key=lambda record: record["at"])

    def after(self, since: float) -> list[dict[str, Any]]:
        """Those of a later time, of what was read."""
        found = []
        for record in reversed(self.all):
            if record["at"] < since - 1.0:
                break
            if record["at"] > since:
                found.append(record)
        return found

    def first(self, since: float, fits: Callable[[dict[str, Any]], bool] = lambda record: True) -> dict[str, Any]:
        """Waits for one after `since` that fits."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            self.read()
            found = [record for record in self.after(since) if fits(record)]
            if found:
                return min(found, key=lambda record: record["at"])
            time.sleep(0.02)  # lines of files that others write: nothing tells of them
        raise TimeoutError((self.folder / "log").read_text()[-3000:])

    def processes(self) -> list[int]:
        """Those that have made a step just now."""
        now = time.time()
        self.read()
        return sorted({record["process"] for record in self.after(now - 0.5)})


def start(folder: Path, ranks: int, *arguments: str, spares: int = 0, **variables: str) -> subprocess.Popen[bytes]:
    """A training as a job; its processes write into `folder`."""
    options = ["--ranks", str(ranks), "--restarts", "1000000", "--spares", str(spares)]
    command = [*RUN, *options, RANKS_PROGRAM, str(folder), *arguments]
    log = (folder / "log").open("wb")
    return subprocess.Popen(command, env=environment(**variables), stdout=log, stderr=log, start_new_session=True)


def end(job: subprocess.Popen[bytes]) -> None:
    if job.poll() is None:
        job.terminate()
        job.wait(60)


def recovery(short: bool) -> dict[str, Any]:
    """Kills one of four ranks, again and again, each time once all are there."""
    times: dict[str, dict[str, list[float]]] = {}
    for transport, spares in (("shm", 0), ("torch_p2p", 0), ("shm", 1)):
        shrunk, joined = [], []
        with tempfile.TemporaryDirectory() as name:
            log = Records(Path(name))
            job = start(log.folder, 4, "--seconds", "3600", spares=spares, RINGRED_TRANSPORT=transport)
            try:
                for turn in tqdm(range(3 if short else KILLS), desc=transport):
                    log.first(time.time(), lambda r: r["size"] == 4)
                    time.sleep(10.0 * spares)  # a spare imports for some seconds, and says nothing when it is done
                    processes = log.processes()
                    died = time.time()
                    os.kill(processes[turn % len(processes)], signal.SIGKILL)
                    step = log.first(died, lambda r: r["size"] == 3)
                    whole = log.first(step["at"], lambda r: r["size"] == 4)
                    shrunk.append(step["at"] - died)
                    joined.append(whole["at"] - died)
            finally:
                end(job)
        times[f"{transport}, {spares} spare" if spares else transport] = {"shrunk": shrunk, "joined": joined}
    show(times)
    return times


def show(times: dict[str, dict[str, list[float]]]) -> None:
    rows = [
        (transport, what, *(f"{value:.2f}" for value in Spread.of(values)), f"{max(values):.2f}", len(values))
        for transport, by in times.items()
        for what, values in by.items()
    ]
    print(tabulate(rows, headers=["transport", "seconds until", "median", "quartile", "quartile", "most", "kills"]))


def torchrun(short: bool) -> dict[str, Any]:
    """Kills one of four ranks, again and again: from there to the next step, and the steps that are made again."""
    restarted, again = [], []
    with tempfile.TemporaryDirectory() as name:
        lines = Records(Path(name))
        command = [str(ROOT / "launch" / "torchrun.sh"), "4", str(Path(__file__).with_name("faults_peer.py")), name]
        # With the agent's store, ranks that were started again look for Gloo's addresses of those before, and fail.
        variables = {"TORCHRUN_ARGS": "--standalone --max-restarts=1000", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        variables["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with (lines.folder / "log").open("wb") as log:
            job = subprocess.Popen(
                command, env=environment(**variables), stdout=log, stderr=log, start_new_session=True
            )
        try:
            for turn in tqdm(range(3 if short else KILLS), desc="torchrun"):
                lines.first(time.time())
                time.sleep(2.0)  # a checkpoint is behind them by then, as in any training that goes on
                there = lines.processes()
                died = time.time()
                os.kill(there[turn % len(there)], signal.SIGKILL)
                step = lines.first(died, lambda r, there=there: r["process"] not in there)
                last = max(r["step"] for r in lines.all if r["process"] in there)
                restarted.append(step["at"] - died)
                again.append(last - step["step"] + 1)
        finally:
            end(job)
    show({"torch's DDP on Gloo, torchrun": {"restarted": restarted}})
    print(f"steps made again: {statistics.median(again):g} in the median, a checkpoint every 50")
    return {"restarted": restarted, "again": again}


def torchft(short: bool) -> dict[str, Any]:
    """As `recovery`, under torchft, with the lighthouse's timeouts as its README has them, and with shorter ones."""
    times = {
        "torchft, 10 and 30 s": with_torchft(3 if short else KILLS, 10.0, 5.0, 30.0),
        "torchft, 1 and 10 s": with_torchft(3 if short else KILLS, 1.0, 1.0, 10.0),
    }
    show(times)
    return times


def with_torchft(kills: int, joins: float, beats: float, waits: float) -> dict[str, list[float]]:
    """Seconds for each of `kills`: it waits `joins` seconds for replicas that are late, `beats` for a heartbeat, and
    `waits` for all else. Who is killed is started again at once."""
    program = str(Path(__file__).with_name("faults_torchft.py"))
    python = os.environ.get("TORCHFT_PYTHON", sys.executable)
    lighthouse = [str(Path(python).with_name("torchft_lighthouse")), "--min_replicas", "1", "--quorum_tick_ms", "100"]
    lighthouse += ["--join_timeout_ms", f"{1000 * joins:.0f}", "--heartbeat_timeout_ms", f"{1000 * beats:.0f}"]
    if not Path(lighthouse[0]).exists():
        raise SystemExit(f"no {lighthouse[0]}: TORCHFT_PYTHON names a Python with torch, scikit-learn and torchft")
    shrunk, joined = [], []
    with tempfile.TemporaryDirectory() as name, reserved_port() as port, ExitStack() as stack:
        lines = Records(Path(name))
        log = stack.enter_context((lines.folder / "log").open("wb"))
        address = f"127.0.0.1:{port}"

        def begin(*command: str) -> subprocess.Popen[bytes]:
            job = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
            stack.callback(job.wait)
            stack.callback(job.kill)
            return job

        begin(*lighthouse, "--bind", address)
        arguments = (f"http://{address}", str(waits))
        replicas = [begin(python, program, name, str(n), *arguments) for n in range(4)]
        for turn in tqdm(range(kills), desc=f"torchft, {joins:g} and {waits:g} s"):
            lines.first(time.time(), lambda r: r["size"] == 4)
            time.sleep(2.0)  # all four have gone on together for a while, not only met
            victim = turn % 4
            died = time.time()
            replicas[victim].kill()
            replicas[victim] = begin(python, program, name, str(victim), *arguments)
            step = lines.first(died, lambda r: r["size"] == 3)
            whole = lines.first(step["at"], lambda r: r["size"] == 4)
            shrunk.append(step["at"] - died)
            joined.append(whole["at"] - died)
    return {"shrunk": shrunk, "joined": joined}


def stepping(folder: Path) -> list[int]:
    """The processes that have made a step within a second, and are there."""
    files = [path for path in folder.glob("*.jsonl") if path.stat().st_mtime > time.time() - 1.0]
    return sorted(int(path.stem) for path in files if Path(f"/proc/{path.stem}").exists())


def chaos(short: bool) -> dict[str, Any]:
    """A training with failures, and a quarter as long the same without."""
    whole, every = (40.0, 5.0) if short else (600.0, 5.0)
    results: dict[str, Any] = {}
    chosen = random.Random(1)
    for name, seconds in (("undisturbed", whole / 4), ("disturbed", whole)):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            began, killed = time.time(), 0
            job = start(folder, 4, "--seconds", str(seconds))
            try:
                with tqdm(total=int(seconds), desc=name) as bar:
                    following = began + chosen.expovariate(1 / every)
                    while job.poll() is None:
                        time.sleep(0.2)
                        bar.update(min(int(time.time() - began), int(seconds)) - bar.n)
                        if name == "disturbed" and time.time() > following and time.time() < began + seconds:
                            following = time.time() + chosen.expovariate(1 / every)
                            there = stepping(folder)
                            if len(there) > 1:  # nobody goes on after the last one
                                os.kill(chosen.choice(there), signal.SIGKILL)
                                killed += 1
            finally:
                end(job)
            written = Records(folder)
            written.read()
            found = sorted(written.all, key=lambda record: record["at"])
            steps = sorted({r["step"] for r in found})
            final = [r for r in found if "accuracy" in r]
            assert job.returncode == 0, (folder / "log").read_text()[-3000:]
            sizes = [r["size"] for r in found if "loss" in r]
            results[name] = {
                "killed": killed,
                "seconds": time.time() - began,
                "steps": len(steps),
                "missing steps": steps[-1] - len(steps) if steps else None,
                "mean ranks": statistics.mean(sizes),
                "accuracy": sorted({r["accuracy"] for r in final}),
                "weights": len({r["weights"] for r in final}),
                "ranks at the end": len(final),
                "loss": curve(found),
                "recoveries": [seconds for r in final for seconds in r["recoveries"]],
            }
    rows = [
        (name, r["killed"], r["steps"], f"{r['mean ranks']:.2f}", r["accuracy"], r["ranks at the end"], r["loss"][-1])
        for name, r in results.items()
    ]
    print(tabulate(rows, headers=["", "killed", "steps", "mean ranks", "accuracy", "ranks at the end", "loss"]))
    rates = {name: result["steps"] / result["seconds"] for name, result in results.items()}
    print(f"{100 * (1 - rates['disturbed'] / rates['undisturbed']):.1f} % fewer steps in the same time")
    return results


def curve(found: list[dict[str, Any]], points: int = 20) -> list[float]:
    """The mean loss in equal parts of the steps."""
    losses = [(r["step"], r["loss"]) for r in found if "loss" in r]
    most = max(step for step, _ in losses)
    parts: list[list[float]] = [[] for _ in range(points)]
    for step, loss in losses:
        parts[min(points - 1, step * points // (most + 1))].append(loss)
    return [round(statistics.mean(part), 4) for part in parts if part]


def interval(values: list[float]) -> str:
    """The median, and the interval that holds that of all such values in 95 of 100 cases (McGill et al. 1978)."""
    low, median, high = statistics.quantiles(values, n=4)
    margin = 1.57 * (high - low) / len(values) ** 0.5
    return f"{median:+.2f} ({median - margin:+.2f}..{median + margin:+.2f})"


def cost(short: bool) -> dict[str, Any]:
    """Steps of one model, wrapped in both ways, in turn."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "cost.json"
        command = [
            str(ROOT / "launch" / "torchrun.sh"),
            "2",
            RANKS_PROGRAM,
            str(out),
            "--cost",
            "60" if short else "1000",
        ]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(command, env=environment(PATH=path), check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
    rows = [
        (
            name,
            f"{Spread.of(by['raise']).median:.3f}",
            f"{Spread.of(by['shrink']).median:.3f}",
            interval([100 * (b / a - 1) for a, b in zip(by["raise"], by["shrink"], strict=True)]),
        )
        for name, by in found.items()
    ]
    print(tabulate(rows, headers=["model", "ms a step", "with shrink", "more, % (median of turns, 95 % interval)"]))
    return found


def kills(short: bool) -> dict[str, Any]:
    """By the tests' program."""
    program = ROOT / "tests" / "procs" / "programs" / "killed.py"
    found = {}
    for transport, times in (("shm", 200), ("torch_p2p", 100)):
        command = [sys.executable, str(program), "5" if short else str(times), "1"]
        surroundings = environment(RINGRED_TRANSPORT=transport)
        said = subprocess.run(command, env=surroundings, check=True, capture_output=True, text=True).stdout
        found[transport] = said.strip()
        print(f"{transport}: {found[transport]}", flush=True)
    return {"said": found}


EXPERIMENTS = {
    "recovery": recovery,
    "torchrun": torchrun,
    "torchft": torchft,
    "chaos": chaos,
    "cost": cost,
    "kills": kills,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    for name in options.names:
        found = EXPERIMENTS[name](options.short)
        write_json(ROOT / "out" / f"faults-{name}.json", {"context": context(), **found})


if __name__ == "__main__":
    main()
