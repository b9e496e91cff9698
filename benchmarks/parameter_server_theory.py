"""The parameter server's policies: simulated against theory, and live workers against the simulation.

    python benchmarks/parameter_server_theory.py --json out/parameter-server-theory.json
    launch/torchrun.sh 8 benchmarks/parameter_server_theory.py     # live workers that are processes

Theory: Dutta et al., Slow and Stale Gradients Can Win the Race (AISTATS 2018), for mini-batch times that are
exponential with mean 1. Live: workers that sleep as long as a mini-batch would take, mean 20 ms, and push. A push and a
pull take time as well: it is measured with `async` alone, and is a constant part of each mini-batch's time in the
simulation of all others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import context, write_json
from tabulate import tabulate
from torch import nn

import ringred
from ringred.parameter_server.policies import parse
from ringred.parameter_server.simulate import simulate
from ringred.parameter_server.times import Exponential, ShiftedExponential
from ringred.testing import run_ranks

CASES = ((8, 3), (4, 2), (16, 5))
MEAN = 0.020  # seconds of a live mini-batch
LIVE = ("async", "sync", "k_sync:3", "k_batch_sync:3", "k_async:3", "k_batch_async:3", "soft_sync:2")
LIVE += ("bounded_staleness:2",)


def harmonic(count: int) -> Fraction:
    return sum((Fraction(1, at) for at in range(1, count + 1)), Fraction(0))


def theory(workers: int, k: int) -> dict[str, tuple[float | None, float | None, float | None]]:
    """By policy: time per update, its variance, mean staleness; None where no closed form is known."""
    first_k = float(harmonic(workers) - harmonic(workers - k))
    variance = sum(1 / at**2 for at in range(workers - k + 1, workers + 1))
    return {
        f"k_sync:{k}": (first_k, variance, 0.0),
        f"k_batch_sync:{k}": (k / workers, k / workers**2, 0.0),
        f"k_async:{k}": (first_k, None, workers / k - 1),
        f"k_batch_async:{k}": (k / workers, None, (workers - 1) / k),
        "sync": (float(harmonic(workers)), sum(1 / at**2 for at in range(1, workers + 1)), 0.0),
        "async": (1 / workers, 1 / workers**2, workers - 1),
    }


def against_theory(updates: int) -> list[dict[str, Any]]:
    rows = []
    for workers, k in CASES:
        for name, (seconds, variance, staleness) in theory(workers, k).items():
            found = simulate(parse(name), workers, Exponential(1.0), updates, seed=1)
            row: dict[str, Any] = {"workers": workers, "policy": name, "theory": seconds}
            row |= {"simulated": found.time_per_update, "theory_staleness": staleness}
            row |= {"staleness": found.mean_staleness, "theory_variance": variance}
            row |= {"variance": float(found.between.var())}
            if name == "async":
                expected = (1 / workers) * (1 - 1 / workers) ** np.arange(len(found.distribution))
                row["distance_from_geometric"] = float(np.abs(found.distribution - expected).sum() / 2)
            rows.append(row)
    return rows


def live_worker(comm: ringred.Communicator, policy: str, updates: int) -> dict[str, Any]:
    """One worker: sleeps and pushes until all updates are made."""
    weight = nn.Parameter(torch.zeros(100))
    generator = np.random.default_rng(comm.rank)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3)

    with ringred.ParameterServer([weight], optimizer, parse(policy), shards=1, updates=updates, comm=comm) as server:
        server.pull()
        began = time.monotonic()
        while server.sleep(generator.exponential(MEAN)) or True:
            if not server.cancelled:
                weight.grad = torch.ones(100)
                server.push()
            if not server.pull():
                break
        seconds = time.monotonic() - began
        report = server.report()
    assert report.updates == updates
    return {"seconds": seconds / updates, "staleness": report.mean_staleness, "distribution": report.distribution}


def live(run: Callable[[str], list[dict[str, Any]]], workers: int, first: bool) -> list[dict[str, Any]]:
    """Each policy on live workers, beside the simulation without and with what a push and a pull take. Only the
    `first` of several processes has the rows."""
    rows: list[dict[str, Any]] = []
    overhead, measured = 0.0, {name: run(name) for name in LIVE}
    for name, found in measured.items() if first else ():
        seconds = max(of_worker["seconds"] for of_worker in found)
        if name == "async":
            overhead = seconds * workers - MEAN
        plain = simulate(parse(name), workers, Exponential(MEAN), 200_000, seed=2)
        shifted = simulate(parse(name), workers, ShiftedExponential(overhead, MEAN), 200_000, seed=2)
        row = {"policy": name, "live": seconds, "simulated": plain.time_per_update}
        row |= {"simulated_with_overhead": shifted.time_per_update, "overhead": overhead}
        row |= {"staleness": found[0]["staleness"], "simulated_staleness": plain.mean_staleness}
        row |= {"distribution": found[0]["distribution"], "simulated_distribution": plain.distribution.tolist()}
        rows.append(row)
    return rows


def percent(found: float, expected: float | None) -> str:
    return "" if not expected else f"{found / expected - 1:+.2%}"


def print_theory(rows: list[dict[str, Any]], updates: int) -> None:
    print(f"Simulated, {updates} updates, against theory; mini-batch times exponential with mean 1.")
    table = [
        (
            *(row["workers"], row["policy"], row["theory"], row["simulated"], percent(row["simulated"], row["theory"])),
            *(row["theory_variance"], row["variance"], percent(row["variance"], row["theory_variance"])),
            *(row["theory_staleness"], row["staleness"], percent(row["staleness"], row["theory_staleness"])),
        )
        for row in rows
    ]
    heads = ["P", "policy", "theory", "time per update", "", "theory", "variance", "", "theory", "staleness", ""]
    print(tabulate(table, headers=heads, floatfmt=".5f"))
    for row in rows:
        if "distance_from_geometric" in row:
            print(f"async, {row['workers']} workers: {row['distance_from_geometric']:.3%} away from the geometric")


def print_live(rows: list[dict[str, Any]], workers: int, kind: str, updates: int) -> None:
    print(
        f"\n{workers} live workers ({kind}), {updates} updates, sleeps of {MEAN * 1e3:.0f} ms on average; a push and a "
        f"pull take {rows[0]['overhead'] * 1e3:.2f} ms (from async)."
    )
    table = [
        (
            *(row["policy"], row["live"] * 1e3, row["simulated"] * 1e3, percent(row["live"], row["simulated"])),
            *(row["simulated_with_overhead"] * 1e3, percent(row["live"], row["simulated_with_overhead"])),
            *(row["staleness"], row["simulated_staleness"], percent(row["staleness"], row["simulated_staleness"])),
        )
        for row in rows
    ]
    heads = ["policy", "live ms", "simulated", "", "with push and pull", "", "staleness", "simulated", ""]
    print(tabulate(table, headers=heads, floatfmt=".3f"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1_000_000, help="of each simulation against theory")
    parser.add_argument("--live", type=int, default=2000, help="updates of each policy on live workers; 0: none")
    parser.add_argument("--workers", type=int, default=8, help="live workers, if they are threads")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm = ringred.init()
    result: dict[str, Any] = context()
    if comm.size > 1:
        kind, workers = "processes", comm.size
        rows = live(lambda name: [live_worker(comm, name, options.live)], workers, comm.rank == 0)
    else:
        kind, workers = "threads", options.workers
        result["theory"] = against_theory(options.updates)
        print_theory(result["theory"], options.updates)
        rows = []
        if options.live:
            rows = live(lambda name: run_ranks(lambda c: live_worker(c, name, options.live), workers), workers, True)
    if comm.rank == 0:
        if rows:
            print_live(rows, workers, kind, options.live)
        if options.json is not None:
            write_json(options.json, result | {f"live_{kind}": rows})
    comm.close()


if __name__ == "__main__":
    main()
