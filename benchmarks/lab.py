"""The scaling laboratory: hosts on this machine, with networks of a stated rate; measured, and predicted.

    python benchmarks/lab.py run                  # all experiments; `run reduce-4-mpi` one; `run --short` a minute
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

from lab import hosts, published
from lab.experiments import EXPERIMENTS, SHORT, run
from tabulate import tabulate


def _run(options: argparse.Namespace) -> int:
    reason = hosts.unavailable()
    if reason is not None:
        print(f"lab: {reason}", file=sys.stderr)
        return 3
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {"short": SHORT} if options.short else {name: EXPERIMENTS[name] for name in options.names or EXPERIMENTS}
    began = time.monotonic()
    for number, (name, experiment) in enumerate(chosen.items()):
        spent = time.monotonic() - began
        left = f", about {spent / number * (len(chosen) - number) / 60:.0f} min left" if number else ""
        print(f"[{number + 1}/{len(chosen)}{left}] {name}: {experiment.question}", flush=True)
        result = run(name, experiment, options.out)
        print(table(result), flush=True)
    return 0


def table(result: dict[str, Any]) -> str:
    """The rows of an experiment as text."""
    steps = "model" in result["rows"][0]
    rows = []
    for row in result["rows"]:
        what = row["model"] if steps else f"{row['nbytes']} B"
        part = f"{row['efficiency']:.0%}" if steps else f"{row['of_line']:.0%}"
        predicted = "-" if row["predicted"] is None else f"{row['predicted'] * 1e3:.2f}"
        error = "-" if row["error"] is None else f"{row['error']:+.0%}"
        rows.append((what, row["way"], f"{row['seconds'] * 1e3:.2f}", part, predicted, error))
    heads = ["case", "by", "ms", "efficiency" if steps else "of line rate", "predicted ms", "error"]
    dilated = f", times and rate {result['dilation']:g} times slower" if result["dilation"] != 1 else ""
    return f"{result['network']}, {result['by']}{dilated}\n{tabulate(rows, headers=heads)}\n"


def _published(options: argparse.Namespace) -> int:
    rows = []
    for row in published.PUBLISHED:
        began = time.monotonic()
        got = published.simulated(row)
        grid = "x".join(map(str, row.grid))
        points = f"{got - row.efficiency:+.1f}"
        rows.append((row.work, row.model, grid, row.efficiency, got, points, row.left_out, time.monotonic() - began))
    heads = ["work", "model", "grid", "print %", "simulated %", "points", "left out", "s"]
    print(tabulate(rows, headers=heads, floatfmt=".1f"))
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
    write(path, found, table)
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
    running.set_defaults(run=_run)
    for name, job in (("published", _published), ("report", _report), ("clean", _clean)):
        commands.add_parser(name).set_defaults(run=job)
    options = parser.parse_args()
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
