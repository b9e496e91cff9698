"""The laboratory's experiments: what is measured on which network, and what the simulator says of the same."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lab.cases import Case, Experiment
from lab.costs import fitted
from lab.hosts import Hosts, Network
from lab.predict import Costs, all_reduce_seconds, step_of
from lab.profiles import read
from lab.served import served_seconds
from ringred.buckets import MIB
from ringred.testing.bench.all_reduce import bus_bandwidth
from ringred.topology.detect import machine

__all__ = ["EXPERIMENTS", "SHORT", "predict", "run"]

HERE = Path(__file__).parent
_WAYS = ("ring", "halving_doubling", "torus", "double_tree", "direct", "tree", "central", "auto")
_SIZES = (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
_PEERS = ("gloo", "native", "MPI_Allreduce")  # `native` is MPI_Iallreduce, with our deadlines
_GRADIENTS = ("alone", "ring", "halving_doubling", "torus", "tree", "double_tree", "auto", "central", "gloo")


def _each(models: tuple[str, ...], ways: tuple[str, ...], dilation: float, **others: Any) -> list[Case]:
    return [Case(model, way, dilation, **others) for model in models for way in ways]


EXPERIMENTS: dict[str, Experiment] = {
    "reduce-4-torch": Experiment(
        "What part of the line do the algorithms use between 4 hosts, over Gloo's point-to-point?",
        (Network(4, 250),),
        "torch",
        (*_WAYS, "gloo"),
        _SIZES,
    ),
    "reduce-4-mpi": Experiment(
        "The same over Open MPI's TCP, beside its own all-reduce.",
        (Network(4, 250),),
        "mpi",
        (*_WAYS, "native", "MPI_Allreduce"),
        _SIZES,
    ),
    "reduce-8-mpi": Experiment(
        "And between 8 hosts?",
        (Network(8, 125),),
        "mpi",
        ("ring", "halving_doubling", "torus", "direct", "central", "auto", "native", "MPI_Allreduce"),
        (64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "reduce-8-torch": Experiment(
        "Between 8 hosts over Gloo's point-to-point?",
        (Network(8, 125),),
        "torch",
        ("ring", "halving_doubling", "torus", "auto", "gloo"),
        (64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "reduce-16-mpi": Experiment(
        "Between 16?",
        (Network(16, 62.5),),
        "mpi",
        ("ring", "halving_doubling", "torus", "auto", "native"),  # 16 ranks that poll in MPI_Allreduce fill two cores
        (64 << 10, 1 << 20, 4 << 20),
    ),
    "bbr": Experiment(
        "And where TCP's congestion control is BBR, which measures what a connection gets?",
        (Network(4, 250, control="bbr"),),
        "torch",
        ("ring", "halving_doubling", "torus", "auto", "gloo"),
        (1 << 20, 4 << 20, 16 << 20),
    ),
    "racks": Experiment(
        "Two racks of four hosts with an uplink of one host's rate each: does the torus win, or the ring?",
        (Network(8, 250, racks=2, uplink_mbit=250),),
        "mpi",
        ("ring", "torus", "halving_doubling", "direct", "tree", "central"),
        (64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "racks-slow": Experiment(
        "And with an uplink of a quarter of that?",
        (Network(8, 250, racks=2, uplink_mbit=62.5),),
        "mpi",
        ("ring", "torus", "halving_doubling", "double_tree"),
        (64 << 10, 256 << 10, 1 << 20, 4 << 20),
    ),
    "slow-link": Experiment(
        "One host of four has a quarter of the others' rate: who suffers least?",
        (Network(4, 500, slow_mbit=125),),
        "mpi",
        ("ring", "halving_doubling", "torus", "double_tree", "direct", "tree", "central"),
        (64 << 10, 1 << 20, 4 << 20),
    ),
    "steps": Experiment(
        "How much of a training step is left of a P100's on 10 Gbit/s (all times and the rate 20 times slower)?",
        (Network(4, 500),),
        "torch",
        cases=lambda hosts: _each(("resnet50", "alexnet", "lstm"), _GRADIENTS, 20),
        steps=2,
    ),
    "steps-others": Experiment(
        "The same for models of other shapes?",
        (Network(4, 500),),
        "torch",
        cases=lambda hosts: _each(("inception", "graph", "experts", "bert"), ("alone", "ring", "gloo"), 20),
        steps=1,
    ),
    "steps-mpi": Experiment(
        "And over Open MPI's TCP, beside its own all-reduce?",
        (Network(4, 500),),
        "mpi",
        cases=lambda hosts: _each(("resnet50", "lstm"), ("alone", "ring", "halving_doubling", "auto", "native"), 20),
        steps=2,
    ),
    "hierarchy": Experiment(
        "Two ranks on each of four hosts: what does it save to add within a host first?",
        (Network(4, 500, each=2),),
        "torch",
        ("ring", "hierarchical", "torus", "halving_doubling", "auto", "gloo"),
        (64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "hierarchy-steps": Experiment(
        "And in a training step?",
        (Network(4, 500, each=2),),
        "torch",
        cases=lambda hosts: _each(("resnet50",), ("alone", "ring", "hierarchical", "auto", "gloo"), 20),
        steps=2,
    ),
    "hierarchy-servers": Experiment(
        "And by parameter servers, flat and with the ranks of a host as one worker (hosts), for a graph network?",
        (Network(4, 100, each=2),),
        "torch",
        cases=lambda hosts: _each(
            ("graph",),
            ("alone", "ring", "hierarchical", "servers:sync", "hosts:sync", "hosts:k_sync:3", "hosts:async"),
            20,
        ),
        steps=8,
    ),
    "server": Experiment(
        "One server against a ring for VGG-16 on 8 hosts: N (P-1) bytes in and out of its port at once, or 2 N (P-1)/P "
        "through each?",
        (Network(8, 500),),
        "torch",
        cases=lambda hosts: _each(("vgg16",), ("alone", "ring", "direct", "central"), 20),
        steps=1,
    ),
    "servers": Experiment(
        "The parameter server as it is (messages, keys), with one server and with one on each host, by policy, for a "
        "graph network?",
        (Network(4, 100),),
        "torch",
        cases=lambda hosts: _each(
            ("graph",),
            (
                *("alone", "ring", "server:sync", "servers:sync", "servers:k_sync:3", "servers:async"),
                *("server:async", "servers:k_async:2"),
            ),
            20,
        ),
        steps=8,
    ),
    "scaling": Experiment(
        "ResNet-50 on 2, 4 and 8 hosts: the same batch on each (weak), or divided among them (strong)?",
        (Network(2, 500), Network(4, 500), Network(8, 500)),
        "torch",
        cases=lambda hosts: [
            *(Case("resnet50", way, 20, label="weak") for way in ("ring", "gloo")),
            *(Case("resnet50", way, 20, batch=32 // hosts, label="strong") for way in ("ring", "gloo")),
        ],
        steps=3,
    ),
    "ratio": Experiment(
        "How much computation hides the communication of ResNet-50 (2.5 to 80 times that of a P100, one network)?",
        (Network(4, 500),),
        "torch",
        cases=lambda hosts: [
            Case("resnet50", way, times, label=f"x{times:g}")
            for times in (2.5, 5, 10, 20, 40, 80)
            for way in ("ring", "gloo")
        ],
        steps=1,
    ),
    "buckets": Experiment(
        "What do buckets of other sizes change for ResNet-50?",
        (Network(4, 500),),
        "torch",
        cases=lambda hosts: [
            Case("resnet50", way, 20, cap_mib=cap, label=f"{cap:g} MiB")
            for cap in (1, 5, 25, 100)
            for way in ("ring", "double_tree", "gloo")
        ],
        steps=2,
    ),
    "stragglers": Experiment(
        "One host computes 1.5 times as long: what do those lose that wait for it, and those that need not?",
        (Network(4, 100),),
        "torch",
        cases=lambda hosts: [
            Case("graph", way, 20, slowness=slowness, label=f"x{slowness:g}")
            for slowness in (1.0, 1.5)
            for way in ("ring", "gloo", "servers:sync", "servers:k_sync:3", "servers:async")
        ],
        steps=8,
    ),
    "replay": Experiment(
        "Does a replayed model take as long as the real one that was recorded (500 Mbit/s, nothing slowed down)?",
        (Network(2, 500),),
        "torch",
        cases=lambda hosts: [
            Case(f"{kind}:{name}", way)
            for name in ("mlp", "cnn")
            for way in ("alone", "ring", "gloo")
            for kind in ("real", "replayed")
        ],
        steps=15,
    ),
    "accuracy": Experiment(
        "How long until the digits are 97 % right, and a small GPT needs 2.3 nats a byte, on 4 hosts of 100 Mbit/s?",
        (Network(4, 100),),
        "torch",
        ("alone", "ring", "gloo", "servers:sync", "servers:async"),
        trainings=("digits", "gpt"),
    ),
}
SHORT = Experiment(
    "Four hosts, a few sizes: the laboratory in a minute.",
    (Network(4, 500),),
    "torch",
    ("ring", "halving_doubling", "central", "auto", "gloo"),
    (64 << 10, 1 << 20),
    seconds=0.3,
)


def run(name: str, experiment: Experiment, folder: Path, profile: str | None = None) -> dict[str, Any]:
    """Measures an experiment and predicts it; the result is written to `folder` as well. With `profile`, training steps
    are those of a recorded model, and the result has its name."""
    began, here = time.monotonic(), machine()
    stem = "" if profile is None else Path(profile).stem
    result: dict[str, Any] = {"name": f"{name}+{stem}" if stem else name, "question": experiment.question}
    if stem:
        result["question"] += f" (with the model {stem})"
    result |= {"networks": list(map(str, experiment.networks)), "by": experiment.by, "seconds": 0.0}
    result |= {"date": datetime.date.today().isoformat(), "cores": here.usable_cores}
    result["machine"] = (
        f"{here.processor}, {here.usable_cores} cores; Linux {platform.release()}; torch {torch.__version__}"
    )
    result |= {"calibrations": [], "costs": [], "rows": []}
    for network in experiment.networks:
        cases = [] if experiment.cases is None else list(experiment.cases(network.hosts))
        if profile is not None:
            whole = (case for case in cases if case.batch is None)  # a recorded batch cannot be divided
            cases = list({Case(**{**asdict(case), "model": profile}): None for case in whole})
        found = list(_measured(experiment, network, cases))
        result["calibrations"].append(next((line["calibrations"] for line in found if "calibrations" in line), None))
        result["rows"] += [{"hosts": network.hosts, **line} for line in found if "way" in line]
    result["seconds"] = time.monotonic() - began
    _write(result, folder)  # whatever becomes of its prediction
    return _predicted(result, experiment, folder)


def predict(name: str, experiment: Experiment, folder: Path) -> dict[str, Any] | None:
    """Predicts again what was measured, from the same calibrations; None if the experiment was not run, or was run on
    other networks than it names now."""
    path = folder / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    same = result.get("networks") == list(map(str, experiment.networks))
    return _predicted(result, experiment, folder) if same else None


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
    unfinished = folder / f".{result['name']}.{os.getpid()}"
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(folder / f"{result['name']}.json")


def _measured(experiment: Experiment, network: Network, cases: list[Case]) -> Iterator[dict[str, Any]]:
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
        texts = start(program, json.dumps(task), RINGRED_TIMEOUT=600, **variables)
    for line in texts[0].splitlines():
        if line.startswith("{"):
            yield json.loads(line)


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
        if costs is not None and way not in _PEERS:
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
    if case.way in _PEERS or costs is None:
        return None
    model = read(case.model, case.batch)
    if ":" in case.way:
        return served_seconds(case.way, model, case.dilation, costs, network, case.slowness)
    caps = {} if case.cap_mib is None else {"caps": (int(case.cap_mib * MIB),)}
    return step_of(model, case.dilation, case.way, costs, network, slowness=case.slowness, **caps).seconds
