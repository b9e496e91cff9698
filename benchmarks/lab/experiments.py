"""The laboratory's experiments: what is measured on which network, and what the simulator says of the same."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.hosts import Hosts, Network
from lab.predict import Costs, all_reduce_seconds, busbw, step_of, uplinks
from lab.profiles import profile

__all__ = ["EXPERIMENTS", "Experiment", "run"]

HERE = Path(__file__).parent
_PEERS = ("gloo", "native", "alone")


@dataclass(frozen=True)
class Experiment:
    """All-reduces (`sizes`) or training steps (`models`, whose times are `dilation` times those of the processor) on a
    network, by these ways. `by` is "torch" (Gloo connects the ranks) or "mpi"."""

    question: str
    network: Network
    by: str
    ways: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    dilation: float = 1.0
    steps: int = 2
    seconds: float = 1.0


_WAYS = ("ring", "halving_doubling", "torus", "double_tree", "direct", "tree", "central", "auto")
_SIZES = (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)

EXPERIMENTS: dict[str, Experiment] = {
    "reduce-4-torch": Experiment(
        "What part of the line do the algorithms use between 4 hosts, over Gloo's point-to-point?",
        Network(4, 500),
        "torch",
        (*_WAYS, "gloo"),
        _SIZES,
    ),
    "reduce-4-mpi": Experiment(
        "The same over Open MPI's TCP, beside its own all-reduce.",
        Network(4, 500),
        "mpi",
        (*_WAYS, "native"),
        _SIZES,
    ),
    "reduce-8-mpi": Experiment(
        "And between 8 hosts?",
        Network(8, 250),
        "mpi",
        ("ring", "halving_doubling", "torus", "direct", "central", "auto", "native"),
        (64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "racks": Experiment(
        "Two racks of four hosts with an uplink of one host's rate each: does the torus win, or the ring?",
        Network(8, 250, racks=2, uplink_mbit=250),
        "mpi",
        ("ring", "torus", "halving_doubling", "direct", "tree", "central"),
        (64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "steps": Experiment(
        "How much of a training step is left of a P100's on 10 Gbit/s (all times and the rate 20 times slower)?",
        Network(4, 500),
        "torch",
        ("alone", "ring", "halving_doubling", "double_tree", "auto", "central", "gloo"),
        models=("resnet50", "alexnet", "lstm"),
        dilation=20,
    ),
    "server": Experiment(
        "One server against a ring for VGG-16 on 8 hosts: N (P-1) bytes in and out of its port at once, or 2 N (P-1)/P "
        "through each?",
        Network(8, 1000),
        "torch",
        ("alone", "ring", "direct", "central"),
        models=("vgg16",),
        dilation=10,
        steps=1,
    ),
}
SHORT = Experiment(
    "Four hosts, a few sizes: the laboratory in a minute.",
    Network(4, 500),
    "torch",
    ("ring", "halving_doubling", "central", "auto", "gloo"),
    (64 << 10, 1 << 20),
    seconds=0.3,
)


def run(name: str, experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Measures an experiment and predicts it; the result is written to `folder` as well."""
    began = time.monotonic()
    rows, costs = [], None
    for found in _measured(experiment):
        if "costs" in found:
            costs = Costs(*found["costs"], found["segment"])
            continue
        assert costs is not None, "the costs come first"
        rows.append(_row(experiment, found, costs))
    result = {
        "name": name,
        "question": experiment.question,
        "network": str(experiment.network),
        "by": experiment.by,
        "hosts": experiment.network.hosts,
        "dilation": experiment.dilation,
        "costs": None if costs is None else asdict(costs),
        "seconds": time.monotonic() - began,
        "rows": rows,
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _measured(experiment: Experiment) -> Iterator[dict[str, Any]]:
    task: dict[str, Any] = {"ways": experiment.ways, "steps": experiment.steps, "dilation": experiment.dilation}
    if experiment.models:
        program, task = HERE / "step_ranks.py", {**task, "models": experiment.models}
    else:
        program = HERE / "reduce_ranks.py"
        task |= {"sizes": experiment.sizes, "seconds": experiment.seconds}
    root = HERE.parents[1]
    variables = {"PYTHONPATH": f"{root}:{HERE.parent}", "RINGRED_TUNING": "off"}
    with Hosts(experiment.network) as hosts:
        start = hosts.torch_ranks if experiment.by == "torch" else hosts.mpi_ranks
        texts = start(program, json.dumps(task), RINGRED_TIMEOUT=120, **variables)
    for line in texts[0].splitlines():
        if line.startswith("{"):
            yield json.loads(line)
    print(f"  {experiment.network}: done", file=sys.stderr)


def _row(experiment: Experiment, found: dict[str, Any], costs: Costs) -> dict[str, Any]:
    size, ports = experiment.network.hosts, uplinks(experiment.network, costs)
    way, predicted = found["way"], None
    if experiment.models:
        model = profile(found["model"])
        alone = model.seconds * experiment.dilation
        if way == "alone":
            predicted = alone
        elif way not in _PEERS:
            predicted = step_of(model, experiment.dilation, way, size, costs, ports=ports).seconds
        extra: dict[str, Any] = {"efficiency": alone / found["seconds"], "communication": found["seconds"] - alone}
    else:
        if way not in _PEERS:
            predicted = all_reduce_seconds(way, size, found["nbytes"], costs, ports)
        extra = {"of_line": busbw(size, found["nbytes"], found["seconds"]) / experiment.network.bytes_per_second}
    error = None if predicted is None else predicted / found["seconds"] - 1
    return {**found, **extra, "predicted": predicted, "error": error}
