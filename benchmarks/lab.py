"""The scaling laboratory: hosts on this machine, with networks of a stated rate; measured, and predicted.

    python benchmarks/lab.py run                  # all experiments; `run reduce-4-mpi` one; `run --short` a minute
    python benchmarks/lab.py record my.py:make    # a model's times, layer by layer, for
    python benchmarks/lab.py run steps --profile out/lab/profiles/my.json
    python benchmarks/lab.py predict              # predictions of what was run, again: after a change of the simulator
    python benchmarks/lab.py published            # efficiencies in print against the simulator's
    python benchmarks/lab.py report               # out/lab/report.html of what has been run
    python benchmarks/lab.py clean                # removes what killed runs left

Needs root, iproute2 and util-linux; nothing leaves the machine. `run` writes out/lab/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from lab import hosts, published, record
from lab.experiments import EXPERIMENTS, SHORT, predict, run
from lab.rows import cells
from tabulate import tabulate


def _run(options: argparse.Namespace) -> int:
    reason = hosts.unavailable()
    if reason is not None:
        print(f"lab: {reason}", file=sys.stderr)
        return 3
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {"short": SHORT} if options.short else {name: EXPERIMENTS[name] for name in options.names or EXPERIMENTS}
    left_out: list[str] = []
    began = time.monotonic()
    for number, (name, experiment) in enumerate(chosen.items()):
        spent = time.monotonic() - began
        left = f", about {spent / number * (len(chosen) - number) / 60:.0f} min left" if number else ""
        print(f"[{number + 1}/{len(chosen)}{left}] {name}: {experiment.question}", flush=True)
        lacking = next(filter(None, (network.unavailable for network in experiment.networks)), None)
        if lacking is not None:
            print(f"left out: {lacking}\n", flush=True)
            left_out.append(name)
            continue
        result = run(name, experiment, options.out, options.profile)
        print(table(result), flush=True)
    return 3 if left_out and (options.names or len(left_out) == len(chosen)) else 0


def _predict(options: argparse.Namespace) -> int:
    for name, experiment in {"short": SHORT, **EXPERIMENTS}.items():
        if (result := predict(name, experiment, options.out)) is not None:
            print(f"{name}: {experiment.question}\n{table(result)}", flush=True)
    return 0


def table(result: dict[str, Any]) -> str:
    """The rows of an experiment as text."""
    heads, rows = cells(result)
    return f"{'; '.join(result['networks'])}; {result['by']}\n{tabulate(rows, headers=heads)}\n"


def _record(options: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    found = record.record(Path(options.model.rpartition(":")[0] or options.model).stem, record.load(options.model))
    path = options.out / "profiles" / f"{found.name}.json"
    record.write(path, found)
    print(f"{path}: {found.nbytes / 2**20:.1f} MiB, a step of {found.seconds * 1e3:.1f} ms (medians of 9)")
    return 0


def _published(options: argparse.Namespace) -> int:
    fit = published.fitted()
    print(f"fitted to the smallest counts: {fit.overhead:.1%} of computation beside, {fit.link:.0%} of a link used")
    rows = []
    for row in (*published.CALIBRATION, *published.PUBLISHED):
        began = time.monotonic()
        got = published.simulated(row, fit)
        fitted = "fitted" if row in published.CALIBRATION else ""
        told = (row.work, row.model, "x".join(map(str, row.grid)), row.efficiency, got, got - row.efficiency, fitted)
        rows.append((*told, row.left_out, time.monotonic() - began))
    heads = ["work", "model", "grid", "print %", "simulated %", "points", "", "left out", "s"]
    print(tabulate(rows, headers=heads, floatfmt=("", "", "", ".1f", ".1f", "+.1f", "", "", ".1f")))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "published.json").write_text(json.dumps([list(map(str, row)) for row in rows], indent=1) + "\n")
    return 0


def _report(options: argparse.Namespace) -> int:
    from lab.report import write

    paths = [options.out / f"{name}.json" for name in ("short", *EXPERIMENTS)]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not found:
        print(f"lab: nothing was run yet: no experiment's file in {options.out}", file=sys.stderr)
        return 2
    path = options.out / "report.html"
    write(path, found)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, of {len(found)} experiments")
    return 0


def _clean(options: argparse.Namespace) -> int:
    names = hosts.clean() if hosts.unavailable() is None else []
    print("removed " + ", ".join(names) if names else "nothing to do")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/lab"))
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure and predict")
    running.add_argument("names", nargs="*", choices=[[], *EXPERIMENTS], metavar="NAME", help=", ".join(EXPERIMENTS))
    running.add_argument("--short", action="store_true")
    running.add_argument("--profile", metavar="FILE", help="a recorded model in the place of the experiment's")
    running.set_defaults(run=_run)
    recording = commands.add_parser("record", help="a model's times, layer by layer")
    recording.add_argument("model", help=f"{', '.join(record.REAL)}, or FILE.py:FUNCTION")
    recording.set_defaults(run=_record)
    for name, job in (("predict", _predict), ("published", _published), ("report", _report), ("clean", _clean)):
        commands.add_parser(name).set_defaults(run=job)
    options = parser.parse_args()
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
