"""Measures the laboratory's experiments, and lets the simulator say what it expected."""

from __future__ import annotations

import datetime
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import ringred
from lab.cases import Case, Experiment
from lab.costs import fitted
from lab.experiments import PEERS
from lab.hosts import Hosts, RanksFailed, mine, mpi_version
from lab.network import Network
from lab.predict import Costs, all_reduce_seconds, step_of
from lab.profiles import read
from lab.served import served_seconds
from ringred.buckets import MIB
from ringred.testing.bench.all_reduce import bus_bandwidth
from ringred.topology.detect import machine

__all__ = ["predict", "run"]

HERE = Path(__file__).parent


def run(name: str, experiment: Experiment, folder: Path, profile: str | None = None) -> dict[str, Any]:
    """Measures an experiment and predicts it; the result is written to `folder` as well. With `profile`, training steps
    are those of a recorded model, and the result has its name.

    Where ranks fail, the steps or trainings that were measured until then are kept, and "failed" says how they ended;
    if a complete result is there, it stays, and this one is NAME.failed. Raises `RanksFailed` if none was measured.
    """
    began, here = time.monotonic(), machine()
    stem = "" if profile is None else Path(profile).stem
    result: dict[str, Any] = {"name": f"{name}+{stem}" if stem else name, "question": experiment.question}
    if stem:
        result["question"] += f" (with the model {stem})"
    result |= {"networks": list(map(str, experiment.networks)), "by": experiment.by, "seconds": 0.0}
    result |= {"date": datetime.date.today().isoformat(), "cores": here.usable_cores}
    versions = [f"Linux {platform.release()}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [mpi_version()] if experiment.by == "mpi" else []
    result["machine"] = "; ".join(
        [f"{here.processor}, {here.usable_cores} cores", *versions, f"ringred {ringred.__version__}"]
    )
    result |= {"calibrations": [], "costs": [], "rows": []}
    last: RanksFailed | None = None
    for network in experiment.networks:
        cases = [] if experiment.cases is None else list(experiment.cases(network))
        if profile is not None:
            whole = (case for case in cases if case.batch is None)  # a recorded batch cannot be divided
            cases = list({Case(**{**asdict(case), "model": profile}): None for case in whole})
        found, failure = _measured(experiment, network, cases)
        calibrations = [line["calibrations"] for line in found if "calibrations" in line]
        result["calibrations"].append(calibrations[-1] if calibrations else None)  # each line has those before as well
        result["rows"] += [{"hosts": network.hosts, **line} for line in found if "way" in line]
        if failure is not None:
            result.setdefault("failed", []).append(f"{network}: {failure}")
            last = failure
    if not result["rows"]:
        raise last or RuntimeError(f"{name}: no rank said anything")
    result["seconds"] = time.monotonic() - began
    _write(result, folder)  # whatever becomes of its prediction
    return _predicted(result, experiment, folder)


def predict(name: str, experiment: Experiment, folder: Path) -> dict[str, Any] | None:
    """Predicts again what was measured, from the same calibrations; None if the experiment was not run, or was run on
    other networks than it names now."""
    path = folder / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("networks") != list(map(str, experiment.networks)):
        return None
    if "+" not in name:  # which has a model's name in it
        result["question"] = experiment.question
    return _predicted(result, experiment, folder)


def _predicted(result: dict[str, Any], experiment: Experiment, folder: Path) -> dict[str, Any]:
    """The result with what the simulator says of its rows; written to `folder`."""
    rows, result["costs"] = [], []
    for network, calibrations in zip(experiment.networks, result["calibrations"], strict=True):
        costs: Costs | None = None
        seen: set[tuple[str, int]] = set()
        if calibrations is not None:
            costs = fitted(calibrations, network, result["cores"], experiment.by == "torch")
            result["costs"].append(asdict(costs))
            samples = calibrations[0]["samples"]
            seen = {(known["name"], known["nbytes"]) for known in samples if known["ranks"] == network.ranks}
        lines = [row for row in result["rows"] if row["hosts"] == network.hosts]
        rows += [_row(line, lines, costs, network, seen) for line in lines]
    result["rows"] = rows
    _write(result, folder)
    return result


def _write(result: dict[str, Any], folder: Path) -> None:
    path = folder / f"{result['name']}.json"
    if "failed" not in result:
        path.with_suffix(".failed").unlink(missing_ok=True)
    elif path.exists() and "failed" not in json.loads(path.read_text()):
        path = path.with_suffix(".failed")
    unfinished = folder / f".{mine()}-{path.name}"
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def _measured(
    experiment: Experiment, network: Network, cases: list[Case]
) -> tuple[list[dict[str, Any]], RanksFailed | None]:
    """What rank 0 told, line by line, and why it told no more, if ranks failed."""
    task: dict[str, Any] = {"ways": experiment.ways, "steps": experiment.steps, "seconds": experiment.seconds}
    if cases:
        program, task = HERE / "step_ranks.py", {**task, "cases": [asdict(case) for case in cases]}
    elif experiment.trainings:
        program, task = HERE / "train_ranks.py", {**task, "trainings": experiment.trainings}
    else:
        program, task = HERE / "reduce_ranks.py", {**task, "sizes": experiment.sizes}
    root = HERE.parents[1]
    variables = {"PYTHONPATH": f"{root}:{HERE.parent}", "RINGRED_TUNING": "off"}
    drawn: dict[str, Any] = {"bar_format": "{l_bar}{bar}| {elapsed}, {remaining} left", "leave": False, "disable": None}
    with tqdm(total=1.0, desc=f"  {network}", **drawn) as bar, Hosts(network, lambda text: _show(bar, text)) as hosts:
        start = hosts.torch_ranks if experiment.by == "torch" else hosts.mpi_ranks
        failure = None
        try:
            texts = start(program, json.dumps(task), RINGRED_TIMEOUT=600, **variables)
        except RanksFailed as failed:
            texts, failure = failed.texts, failed
    lines = [line for line in texts[0].splitlines(keepends=True) if line.startswith("{")]
    if failure is not None:  # a rank that was killed may have left its last line unfinished
        lines = [line for line in lines if line.endswith("}\n")]
    return list(map(json.loads, lines)), failure


def _show(bar: tqdm[Any], text: str) -> None:
    """How much ranks have done, by the last line in which they say so."""
    _, found, told = text.rpartition('{"done": ')
    part, whole, _ = told.partition("}")
    if found and whole:
        bar.n = float(part)
        bar.refresh()


def _row(
    found: dict[str, Any],
    lines: list[dict[str, Any]],
    costs: Costs | None,
    network: Network,
    seen: set[tuple[str, int]],
) -> dict[str, Any]:
    """A measured case with what was predicted of it; `fitted` are those that the costs were fitted to."""
    way = found["way"]
    row = {**found, "predicted": None, "error": None}
    row["fitted"] = (way, found.get("nbytes")) in seen
    if "nbytes" in found:
        row["case"] = f"{found['nbytes']} B"
        row["of_line"] = bus_bandwidth(network.ranks, found["nbytes"], found["seconds"]) / network.bytes_per_second
        if costs is not None and way not in PEERS:
            row["predicted"] = all_reduce_seconds(way, found["nbytes"], costs, network)
    elif "training" in found:
        row["case"] = found["training"]
    else:
        case = Case(**{name: found[name] for name in Case.__dataclass_fields__})
        row["case"] = case.name
        real = case.model.partition(":")[0] in ("real", "replayed")
        if real:
            by_itself = (line for line in lines if line["model"] == case.model and line["way"] == "alone")
            alone = next(by_itself)["seconds"]
        else:
            alone = read(case.model, case.batch).seconds * case.dilation
        row["efficiency"] = alone / found["seconds"]
        row["predicted"] = None if real else _step(case, alone, costs, network)
    if row["predicted"] is not None:
        row["error"] = row["predicted"] / found["seconds"] - 1
    return row


def _step(case: Case, alone: float, costs: Costs | None, network: Network) -> float | None:
    if case.way == "alone":
        return alone * case.slowness
    if case.way in PEERS or costs is None:
        return None
    model = read(case.model, case.batch)
    if ":" in case.way:
        return served_seconds(case.way, model, case.dilation, costs, network, case.slowness)
    caps = {} if case.cap_mib is None else {"caps": (int(case.cap_mib * MIB),)}
    return step_of(model, case.dilation, case.way, costs, network, slowness=case.slowness, **caps).seconds
