"""All-reduce and every policy of the parameter server on the same work, with stragglers: error against time, staleness.

    launch/mpirun.sh 4 benchmarks/parameter_server.py --json out/parameter-server.json --plot out/parameter-server

Each worker draws mini-batches of its own and sleeps for each as long as a distribution says, a constant part and an
exponential one; the last worker is `--slow` times as slow. `ring`, `torus`, `tree` and `central` are
DistributedDataParallel with that algorithm. Two problems: the digits CNN, with the error on its test set; and a
quadratic with a known optimum and noisy gradients, with the height above the optimum. The rate is the same for each
gradient: an update of K gradients takes K times the rate. Every system makes as many updates as it is predicted to make
in `--seconds`. The prediction is the simulator's, with a mini-batch's own time on a quiet machine as a constant part.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from harness import context, write_json
from parameter_server_plots import plot_errors, plot_staleness
from tabulate import tabulate
from torch import Tensor, nn

import ringred
from ringred.parameter_server.policies import Sync, parse
from ringred.parameter_server.simulate import Simulated, simulate
from ringred.parameter_server.times import ShiftedExponential, Slowed, Times

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples import train_digits

ALL_REDUCES = ("ring", "torus", "tree", "central")
POLICIES = ("sync", "k_sync:3", "k_batch_sync:3", "k_async:2", "k_batch_async:2", "async", "soft_sync:2")
POLICIES += ("bounded_staleness:2",)
BATCH = 16
LOOKS = 40  # at the error, in one run
Parameters = list[Tensor]


class Problem(NamedTuple):
    """What is trained: `loss` of a mini-batch drawn by a generator, and the `error` of a model."""

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator], Tensor]
    error: Callable[[nn.Module], float]
    rate: float  # for one gradient


def digits() -> Problem:
    train, test = train_digits.digits()
    images, labels = train.tensors

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(len(labels), (BATCH,), generator=generator)
        return F.cross_entropy(model(images[drawn]), labels[drawn])

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(test.tensors[0]).argmax(1) != test.tensors[1]).float().mean().item()

    return Problem("digits", train_digits.make_model, loss, error, 0.05)


def quadratic() -> Problem:
    """½ Σ aᵢwᵢ², from w = 1; gradients a(w − ε), ε normal with deviation 0.3."""
    heights = torch.logspace(-2, 0, 200)

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(200))

        def forward(self, around: Tensor) -> Tensor:
            return (heights * (self.weight - around).square()).sum() / 2

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        found: Tensor = model(0.3 * torch.randn(200, generator=generator))
        return found

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(torch.zeros(200)))

    return Problem("quadratic", Bowl, loss, error, 0.05)


class Run:
    """One system on one problem: what a worker does, and what it looks at meanwhile."""

    def __init__(self, comm: ringred.Communicator, problem: Problem, times: Times, seed: int) -> None:
        self.comm, self.problem, self.times = comm, problem, times
        self.model = problem.make()
        self.batches = torch.Generator().manual_seed(1000 * seed + comm.rank)
        self.delays = np.random.default_rng(1000 * seed + comm.rank)
        self.looks: list[tuple[float, Parameters]] = []
        self.began = 0.0

    def delay(self) -> float:
        return float(self.times.sample(self.delays, self.comm.rank, 1)[0])

    def loss(self, model: nn.Module | None = None) -> Tensor:
        return self.problem.loss(model or self.model, self.batches)

    def look(self, every: float, force: bool = False) -> None:
        """Rank 0 keeps the parameters of now, to measure their error later."""
        now = time.monotonic() - self.began
        if self.comm.rank == 0 and (force or not self.looks or now - self.looks[-1][0] >= every):
            self.looks.append((now, [parameter.detach().clone() for parameter in self.model.parameters()]))

    def start(self) -> None:
        self.comm.barrier()
        self.began = time.monotonic()

    def curve(self) -> list[tuple[float, float]]:
        """(seconds, error) of what was looked at."""
        found = []
        for at, values in self.looks:
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), values, strict=True):
                    parameter.copy_(value)
            found.append((at, self.problem.error(self.model)))
        return found


def by_server(run: Run, policy: str, rate: float, updates: int, every: float) -> dict[str, Any]:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=rate)

    with ringred.ParameterServer(run.model, optimizer, parse(policy), updates=updates, comm=run.comm) as server:
        run.start()
        while server.pull():
            run.look(every)
            if server.sleep(run.delay()):
                run.loss().backward()
                server.push()
        seconds = time.monotonic() - run.began
        run.look(every, force=True)
        report, worker = server.report(), server.worker
        moved = worker.bytes_pushed + worker.bytes_pulled
    assert report.updates == updates
    found = {"staleness": report.mean_staleness, "distribution": report.distribution, "dropped": report.dropped}
    return {"seconds": seconds, "bytes": moved / updates, **found}


def by_all_reduce(run: Run, algorithm: str, rate: float, updates: int, every: float) -> dict[str, Any]:
    model = ringred.DistributedDataParallel(run.model, process_group=run.comm, algorithm=algorithm)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    before = run.comm.counters.bytes_sent + run.comm.counters.bytes_received
    run.start()
    for _ in range(updates):
        run.look(every)
        time.sleep(run.delay())
        optimizer.zero_grad()
        run.loss(model).backward()
        optimizer.step()
    seconds = time.monotonic() - run.began
    run.look(every, force=True)
    moved = run.comm.counters.bytes_sent + run.comm.counters.bytes_received - before
    return {"seconds": seconds, "bytes": moved / updates, "staleness": 0.0, "distribution": [1.0], "dropped": 0}


def own_time(comm: ringred.Communicator, problem: Problem, batches: int = 40) -> float:
    """Seconds of a mini-batch with its push and pull on a machine where nothing else runs; rank 0 measures."""
    seconds = torch.zeros(1, dtype=torch.float64)
    alone = comm.split(comm.rank)
    assert alone is not None
    if comm.rank == 0:
        for _ in range(2):  # the first warms up
            run = Run(alone, problem, ShiftedExponential(0.0, 0.0), 0)
            seconds[0] = by_server(run, "async", 0.0, batches, 1e9)["seconds"] / batches
    alone.close()
    comm.broadcast(seconds, 0)
    return seconds.item()


def measure(comm: ringred.Communicator, problem: Problem, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All systems on one problem. Rows are on rank 0."""
    own = own_time(comm, problem)
    sleeps = Slowed(ShiftedExponential(options.constant, options.delay), comm.size - 1, options.slow)
    rows = []
    for name in [*ALL_REDUCES, *options.policies]:
        policy = Sync() if name in ALL_REDUCES else parse(name)
        expected = predicted(policy, comm.size, options, own)
        updates = max(2, round(options.seconds / expected.time_per_update))
        rate = problem.rate * policy.gradients_per_update(comm.size)
        run = Run(comm, problem, sleeps, options.seed)
        every = options.seconds / LOOKS
        found = (by_all_reduce if name in ALL_REDUCES else by_server)(run, name, rate, updates, every)
        comm.barrier()
        if comm.rank == 0:
            rows.append(
                {
                    "problem": problem.name,
                    "system": name,
                    "rate": rate,
                    "updates": updates,
                    "time_per_update": found["seconds"] / updates,
                    "predicted": expected.time_per_update,
                    "predicted_staleness": expected.mean_staleness,
                    "own_seconds": own,
                    "predicted_distribution": expected.distribution.tolist(),
                    "curve": run.curve(),
                    **found,
                }
            )
            print(f"{problem.name}: {name}: error {rows[-1]['curve'][-1][1]:.4f}", file=sys.stderr, flush=True)
    return rows


def predicted(policy: Any, workers: int, options: argparse.Namespace, own: float) -> Simulated:
    """Of `policy`: the last worker is slow in what it sleeps, and all have a part that nobody makes slower."""
    slow = Slowed(ShiftedExponential(options.constant, options.delay), workers - 1, options.slow)
    return simulate(policy, workers, _Plus(slow, own), 20_000, seed=3)


class _Plus(NamedTuple):
    """`times`, and a constant."""

    times: Times
    constant: float

    @property
    def mean(self) -> float:
        return self.times.mean + self.constant

    def sample(self, generator: np.random.Generator, worker: int, count: int) -> Any:
        return self.times.sample(generator, worker, count) + self.constant


def print_table(rows: list[dict[str, Any]]) -> None:
    table = [
        (
            *(row["system"], f"{row['rate']:g}", row["updates"], f"{row['time_per_update'] * 1e3:.2f}"),
            *(f"{row['predicted'] * 1e3:.2f}", f"{1 / row['time_per_update']:.1f}", f"{row['staleness']:.2f}"),
            *(f"{row['predicted_staleness']:.2f}", f"{row['curve'][-1][1]:.4f}", f"{row['bytes'] / 1e3:.1f}"),
        )
        for row in rows
    ]
    heads = ["system", "rate", "updates", "ms per update", "predicted", "per second", "staleness", "predicted", "error"]
    print(f"{rows[0]['problem']}; a mini-batch, push and pull of its own take {rows[0]['own_seconds'] * 1e3:.1f} ms")
    print(tabulate(table, headers=[*heads, "kB per update"], disable_numparse=True, colalign=("left", *["right"] * 9)))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--seconds", type=float, default=12.0, help="that each run is predicted to take (default 12)")
    parser.add_argument("--constant", type=float, default=0.005, help="seconds that each mini-batch sleeps at least")
    parser.add_argument("--delay", type=float, default=0.015, help="mean of the exponential part of its sleep")
    parser.add_argument("--slow", type=float, default=4.0, help="how many times longer the last worker sleeps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="beginning of the names of two pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm = ringred.init()
    rows = []
    for problem in (digits(), quadratic()):
        rows += measure(comm, problem, options)
    if comm.rank == 0:
        print(
            f"{comm.size} workers; sleeps {options.constant:g} s + exponential {options.delay:g} s, "
            f"the last worker {options.slow:g} times as long"
        )
        for name in ("digits", "quadratic"):
            print_table([row for row in rows if row["problem"] == name])
        if options.json is not None:
            write_json(options.json, context() | {"workers": comm.size, "rows": rows})
        if options.plot is not None:
            options.plot.parent.mkdir(parents=True, exist_ok=True)
            plot_errors(rows, options.plot.with_name(options.plot.name + "-errors.png"))
            plot_staleness(rows, options.plot.with_name(options.plot.name + "-staleness.png"))
    comm.close()


if __name__ == "__main__":
    main()
