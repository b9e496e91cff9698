"""The scaling laboratory: hosts on this machine, with networks of a stated rate; measured, and predicted.

    python benchmarks/lab.py run                  # all experiments; `run reduce-4-mpi` one; `run --short` a minute
    python benchmarks/lab.py record my.py:make    # a model's times, layer by layer, for
    python benchmarks/lab.py run steps --profile out/lab/profiles/my.json
    python benchmarks/lab.py predict              # predictions of what was run, again: after a change of the simulator
    python benchmarks/lab.py published            # efficiencies in print against the simulator's
    python benchmarks/lab.py scale                # the models on 8 to 3,456 ranks, by the simulator alone
    python benchmarks/lab.py report               # out/lab/report.html of what has been run
    python benchmarks/lab.py clean                # removes what killed runs left

`run` and `clean` need root, iproute2 and util-linux; nothing leaves the machine. `run` writes out/lab/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lab import hosts, published, record, scale
from lab.experiments import EXPERIMENTS, SHORT
from lab.profiles import MODELS
from lab.rows import cells, precision, setting, worst
from lab.running import predict, run
from tabulate import tabulate
from tqdm import tqdm


def _run(options: argparse.Namespace) -> int:
    reason = hosts.unavailable()
    if reason is not None:
        print(f"lab: {reason}", file=sys.stderr)
        return 3
    if hosts.left_behind():
        print("lab: a run that was killed has left something behind: `lab.py clean` removes it", file=sys.stderr)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, lambda number, _: sys.exit(128 + number))  # and hosts are removed on the way out
    options.out.mkdir(parents=True, exist_ok=True)
    stepping = [name for name, experiment in EXPERIMENTS.items() if experiment.cases is not None]
    names = options.names or (EXPERIMENTS if options.profile is None else stepping)
    chosen = {"short": SHORT} if options.short else {name: EXPERIMENTS[name] for name in names}
    left_out, failed = list[str](), list[str]()
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
        try:
            result = run(name, experiment, options.out, options.profile)
            print(table(result), flush=True)
            if "failed" in result:
                print(f"failed: {'; '.join(result['failed'])}\n", flush=True)
                failed.append(name)
        except Exception as failure:  # the others may do
            print(f"failed: {type(failure).__name__}: {failure}\n", flush=True)
            failed.append(name)
    if failed:
        print(f"lab: failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 3 if left_out and (options.names or len(left_out) == len(chosen)) else 0


def _predict(options: argparse.Namespace) -> int:
    found = list[dict[str, Any]]()
    for name, experiment in {"short": SHORT, **EXPERIMENTS}.items():
        for path in [options.out / f"{name}.json", *sorted(options.out.glob(f"{name}+*.json"))]:
            if (result := predict(path.stem, experiment, options.out)) is not None:
                print(f"{path.stem}: {result['question']}\n{table(result)}", flush=True)
                found.append(result)
    if found:
        heads, told = precision(found)
        print(f"{tabulate(told, headers=heads)}\n")
        heads, told = worst(found)
        print(tabulate(told, headers=heads))
    return 0


def table(result: dict[str, Any]) -> str:
    """The rows of an experiment as text."""
    heads, rows = cells(result)
    return f"{setting(result)}\n{tabulate(rows, headers=heads)}\n"


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
    for row in tqdm((*published.CALIBRATION, *published.PUBLISHED), leave=False, disable=None):
        began = time.monotonic()
        got = published.simulated(row, fit)
        fitted = "fitted" if row in published.CALIBRATION else ""
        told = (row.work, row.model, "x".join(map(str, row.grid)), row.efficiency, got, got - row.efficiency, fitted)
        rows.append((*told, row.left_out, time.monotonic() - began))
    heads = ["work", "model", "grid", "print %", "simulated %", "points", "", "left out", "s"]
    print(tabulate(rows, headers=heads, floatfmt=("", "", "", ".1f", ".1f", "+.1f", "", "", ".1f")))
    began = time.monotonic()
    got, grid = published.simulated(published.LARGEST, fit), "x".join(map(str, published.LARGEST.grid))
    print(
        f"{published.LARGEST.processors} processors ({grid}), whose efficiency is not in print: {got:.1f} % simulated, "
        f"in {time.monotonic() - began:.1f} s"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    table = {"heads": heads[:-1], "rows": [[*row[:3], *(f"{x:.1f}" for x in row[3:6]), *row[6:-1]] for row in rows]}
    (options.out / "published.json").write_text(json.dumps(table, indent=1) + "\n")
    return 0


def _scale(options: argparse.Namespace) -> int:
    found = list[scale.Scaled]()
    for part in tqdm(scale.scaled(scale.RANKS), total=len(scale.RANKS) * len(scale.WAYS), leave=False, disable=None):
        found += part
    got = {(one.model, one.way, one.ranks): f"{100 * one.efficiency:.0f}" for one in found}
    heads = ["model", "by", *(f"{ranks} ranks" for ranks in scale.RANKS)]
    pairs = dict.fromkeys((one.model, one.way) for one in sorted(found, key=lambda one: list(MODELS).index(one.model)))
    rows = [[*pair, *(got[(*pair, ranks)] for ranks in scale.RANKS)] for pair in pairs]
    print(f"efficiency in percent, against one rank; {scale.STATED}\n{tabulate(rows, headers=heads)}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scale.json").write_text(json.dumps({"heads": heads, "rows": rows}, indent=1) + "\n")
    return 0


def _report(options: argparse.Namespace) -> int:
    from lab.report import write

    order = {name: at for at, name in enumerate(("short", *EXPERIMENTS))}
    texts = {path.stem: json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))}
    simulated = {name: texts.pop(name, None) for name in ("published", "scale")}
    found = [texts[name] for name in sorted(texts, key=lambda name: order.get(name, len(order)))]
    for result in list(found):
        why = None if "machine" in result else "of an earlier version, which did not say where it was measured"
        if not all("error" in row for row in result["rows"]):
            why = "measured, not predicted (`lab.py predict`)"
        if why is not None:
            print(f"lab: {result['name']} is {why}: left out", file=sys.stderr)
            found.remove(result)
    if not found:
        print(f"lab: nothing was run yet: no experiment's file in {options.out}", file=sys.stderr)
        return 2
    path = options.out / "report.html"
    write(path, found, **simulated)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, of {len(found)} experiments")
    return 0


def _clean(options: argparse.Namespace) -> int:
    reason = hosts.unavailable()
    if reason is not None:
        print(f"lab: {reason}", file=sys.stderr)
        return 3
    gone, still = hosts.clean(options.out)
    if still:
        print(f"lab: could not remove {', '.join(still)}", file=sys.stderr)
    print("removed " + ", ".join(gone) if gone else "nothing to do" if not still else "nothing removed")
    return 1 if still else 0


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
    others = {"predict": _predict, "published": _published, "scale": _scale, "report": _report, "clean": _clean}
    for name, job in others.items():
        commands.add_parser(name).set_defaults(run=job)
    options = parser.parse_args()
    if options.run is _run and options.short and (options.names or options.profile):
        parser.error("--short is an experiment of its own: expected neither names nor --profile")
    if options.run is _run and options.profile:
        without = [name for name in options.names if EXPERIMENTS[name].cases is None]
        if without:
            parser.error(f"--profile: expected experiments with training steps, got {', '.join(without)}")
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
