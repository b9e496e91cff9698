"""Scaling efficiency of data-parallel training, algorithm by algorithm, beside the parameter-server pattern.

    launch/mpirun.sh 2 benchmarks/scaling.py --json out/scaling.json --plot out/scaling.png

Weak scaling: every rank has the same batch on 1 and on N ranks. Efficiency is the time of a step of one rank,
alone on its machine and without any communication, over the time of a step on N. `central` is the baseline that
rings replace: all ranks send to rank 0, which sends the result back. `server` is a real parameter server under Sync, on
one rank and sharded over all of them, which steps the optimizer too. Efficiency means nothing without accuracy, so each
algorithm also trains the digits example completely.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Spread, context, interleaved, write_json
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

import ringred
from ringred.collectives.registry import lookup
from ringred.errors import RingredError
from ringred.parameter_server.policies import Sync
from ringred.runtime.select import predict
from ringred.testing.bench.training import gradient_bytes as gradient_bytes_of
from ringred.testing.bench.training import perceptron, step_timer
from ringred.topology.model import flat

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples import train_digits

# The network that the simulation assumes: 25 Gbit/s Ethernet, and a processor that adds 10 GB/s.
ALPHA, BETA, GAMMA = 20e-6, 0.32e-9, 0.1e-9
SIMULATED = ("ring", "torus", "tree", "halving_doubling", "central")


class OnServers:
    """The step on a parameter server with `shards` shards, and what it moves."""

    def __init__(self, comm: ringred.Communicator, width: int, shards: int) -> None:
        self.comm, self.model = comm, perceptron(width, 1)[0]
        options: dict[str, Any] = {"shards": shards, "comm": comm}
        self.server = ringred.ParameterServer(self.model, self._optimizer, Sync(), **options)
        pieces = [piece for name in self.server.parameters for piece in self.server.worker.pieces[name]]
        own = sum(piece.stop - piece.start for piece in pieces if piece.shard == comm.rank)
        self.share = own / sum(piece.stop - piece.start for piece in pieces)

    @staticmethod
    def _optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    def timer(self, images: Tensor, labels: Tensor, steps: int) -> Callable[[], float]:
        """Seconds per step: pull, backward, push."""

        def run() -> float:
            began = time.perf_counter()
            for _ in range(steps):
                self.server.pull()
                F.cross_entropy(self.model(images), labels).backward()
                self.server.push()
            return (time.perf_counter() - began) / steps

        run()
        run()
        return run

    def bytes_sent(self, images: Tensor, labels: Tensor) -> int:
        """Of a step, by the rank that sends most: its gradients, and the values that its shard gives to all workers."""
        worker = self.server.worker
        before = worker.bytes_pushed, worker.bytes_pulled
        self.timer(images, labels, 1)  # two steps
        pushed, pulled = worker.bytes_pushed - before[0], worker.bytes_pulled - before[1]
        sent = torch.tensor([pushed + self.comm.size * pulled * self.share]) / 2
        self.comm.all_reduce(sent, "max")
        return int(sent.item())


def final_accuracy(comm: ringred.Communicator, algorithm: str, epochs: int) -> float:
    """Test accuracy of the digits example, trained with `algorithm`."""
    train, test = train_digits.digits()
    model = ringred.DistributedDataParallel(
        train_digits.make_model(), process_group=comm, algorithm=algorithm, bucket_cap_mb=train_digits.BUCKET_CAP_MB
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=train_digits.BASE_RATE, momentum=0.9, weight_decay=1e-4)
    sampler = DistributedSampler(train, num_replicas=comm.size, rank=comm.rank, seed=1)
    loader = DataLoader(train, batch_size=train_digits.BATCH, sampler=sampler, drop_last=True)
    schedule = train_digits.schedule_of(optimizer, comm.size, len(loader), epochs)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return float(train_digits.accuracy(model, test, comm))


def row_of(comm: ringred.Communicator, name: str, baseline: Spread, spread: Spread) -> dict[str, Any]:
    """The times of a system."""
    return {
        "algorithm": name,
        "step_ms": spread.median * 1e3,
        "step_ms_low": spread.low * 1e3,
        "step_ms_high": spread.high * 1e3,
        "efficiency": baseline.median / spread.median,
        "speedup": comm.size * baseline.median / spread.median,
        "overhead_ms": (spread.median - baseline.median) * 1e3,
    }


def measure(comm: ringred.Communicator, options: argparse.Namespace) -> tuple[Spread, list[dict[str, Any]], int]:
    """The step of one rank alone, a row for each algorithm, and the bytes of the gradients."""
    images, labels = torch.randn(options.batch, 256), torch.randint(0, 10, (options.batch,))
    gradient_bytes = gradient_bytes_of(options.width)
    alone = step_timer(perceptron(options.width, 1)[0], (images, labels), options.steps)
    models: dict[str, ringred.DistributedDataParallel] = {}
    for name in options.algorithms:
        try:
            models[name] = ringred.DistributedDataParallel(
                perceptron(options.width, 1)[0],
                process_group=comm,
                bucket_cap_mb=options.bucket_mb,
                gradient_as_bucket_view=True,
                algorithm=name,
            )
        except RingredError as refusal:
            if comm.rank == 0:
                print(f"{name} left out: {refusal}")
    measures: dict[str, Callable[[], float]] = {
        name: step_timer(model, (images, labels), options.steps) for name, model in models.items()
    }

    def one_rank() -> float:
        seconds = alone() if comm.rank == 0 else 0.0
        comm.barrier()
        return seconds

    counts = {"server, one shard": 1, f"server, {comm.size} shards": comm.size}
    servers = {name: OnServers(comm, options.width, shards) for name, shards in counts.items()}
    measures |= {name: server.timer(images, labels, options.steps) for name, server in servers.items()}
    bar = tqdm(
        total=options.rounds + len(models) + len(servers),
        desc="steps, then trainings",
        ncols=80,
        leave=False,
        disable=not train_digits.shown(comm),
    )
    samples = interleaved({"one rank": one_rank, **measures}, options.rounds, bar.update)
    baseline = Spread.of(samples.pop("one rank"))
    rows = []
    for name, model in models.items():
        before = comm.counters.bytes_sent
        step_timer(model, (images, labels), 1)  # warms up with two steps, whose bytes are counted
        sent = torch.tensor([comm.counters.bytes_sent - before]) // 2
        comm.all_reduce(sent, "max")
        native = lookup("all_reduce", name).native  # the counters do not include bytes that a library moves itself
        rows.append(
            row_of(comm, name, baseline, Spread.of(samples[name]))
            | {"bytes_sent_by_the_busiest": None if native else int(sent.item())}
            | {"hidden": model.overlap_report().hidden, "accuracy": final_accuracy(comm, name, options.epochs)}
        )
        bar.update()
    for name, server in servers.items():
        moved = server.bytes_sent(images, labels)
        server.server.close()
        trained, _ = train_digits.on_servers(comm, train_digits.digits()[0], "sync", options.epochs, quiet=True)
        reached = train_digits.accuracy(trained, train_digits.digits()[1], comm)
        rows.append(
            row_of(comm, name, baseline, Spread.of(samples[name]))
            | {"bytes_sent_by_the_busiest": moved, "hidden": None, "accuracy": float(reached)}
        )
        bar.update()
    bar.close()
    return baseline, rows, gradient_bytes


def simulate(step_seconds: float, gradient_bytes: int, most: int) -> list[dict[str, Any]]:
    """Predicted efficiency on 1 to `most` ranks, without any overlap: step / (step + all-reduce)."""
    rows = []
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if size <= most]
    for name in SIMULATED:
        entry = lookup("all_reduce", name)
        for size in sizes:
            group = entry.group(size)
            cost = predict(entry, group, gradient_bytes, flat(size, ALPHA, BETA, GAMMA))
            efficiency = step_seconds / (step_seconds + cost.seconds)
            rows.append(
                {"algorithm": name, "ranks": size, "all_reduce_ms": cost.seconds * 1e3, "efficiency": efficiency}
            )
    return rows


def plot(path: Path, result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = result["rows"]
    central = ("central", "server")
    colours = ["#c44e52" if row["algorithm"].startswith(central) else "#4c72b0" for row in rows]
    left.barh([row["algorithm"] for row in rows], [row["efficiency"] for row in rows], color=colours)
    left.axvline(1, color="grey", linewidth=0.8)
    left.invert_yaxis()
    left.set_xlabel(f"efficiency on {result['ranks']} ranks (one rank alone = 1)")
    left.set_title(f"Measured: {result['gradient_bytes'] / 2**20:.0f} MiB of gradients, {result['transport']}")
    for name in SIMULATED:
        points = [row for row in result["simulated"] if row["algorithm"] == name]
        style = "--" if name == "central" else "-"
        right.plot(
            [row["ranks"] for row in points], [row["efficiency"] for row in points], style, marker=".", label=name
        )
    right.set_xscale("log", base=2)
    right.set_ylim(0, 1.05)
    right.set_xlabel("ranks")
    right.set_title(f"Simulated, no overlap: α {ALPHA * 1e6:g} µs, β {BETA * 1e9:g} ns/B, γ {GAMMA * 1e9:g} ns/B")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=len(SIMULATED), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ringred.algorithms("all_reduce"), metavar="NAME")
    parser.add_argument("--width", type=int, default=768, help="of the perceptron that is timed")
    parser.add_argument("--batch", type=int, default=128, help="per rank")
    parser.add_argument("--bucket-mb", type=float, help="bucket cap in MiB (default: 25, the first 1)")
    parser.add_argument("--steps", type=int, default=5, help="steps in one measurement")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each algorithm, interleaved")
    parser.add_argument("--epochs", type=int, default=15, help="of the digits example, for the accuracy")
    parser.add_argument("--simulate-ranks", type=int, default=1024)
    parser.add_argument("--short", action="store_true", help="few rounds and epochs, for a first look")
    parser.add_argument("--bar", action="store_true", help="show progress, where the launcher has a terminal")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.short:
        options.rounds, options.epochs, options.steps = 5, 8, 3

    comm = ringred.init()
    baseline, rows, gradient_bytes = measure(comm, options)
    comm.barrier()
    comm.close()
    if comm.rank == 0:
        simulated = simulate(baseline.median, gradient_bytes, options.simulate_ranks)
        result = {
            **context(),
            "ranks": comm.size,
            "transport": comm.transport.name,
            "baseline": "one rank alone, no communication",
            "baseline_step_ms": baseline.median * 1e3,
            "gradient_bytes": gradient_bytes,
            "rows": rows,
            "model": {"alpha_s": ALPHA, "beta_s_per_byte": BETA, "gamma_s_per_byte": GAMMA},
            "simulated": simulated,
        }
        report(result, baseline, options)


def report(result: dict[str, Any], baseline: Spread, options: argparse.Namespace) -> None:
    cores, ranks = result["machine"]["usable_cores"], result["ranks"]
    print(
        f"\nMeasured on {ranks} ranks over {result['transport']}, {result['gradient_bytes'] / 2**20:.1f} MiB of "
        f"gradients, batch {options.batch} a rank, {torch.get_num_threads()} thread(s) a rank."
    )
    print(
        f"Baseline: one rank alone without communication, {baseline.median * 1e3:.2f} ms a step "
        f"(quartiles {baseline.low * 1e3:.2f} to {baseline.high * 1e3:.2f})."
    )
    if ranks * torch.get_num_threads() > cores:
        print(f"{ranks} ranks share {cores} cores: the efficiency measures the cores, not the communication.")
    table = [
        (
            row["algorithm"],
            f"{row['step_ms']:.2f}",
            f"{row['step_ms_low']:.2f}–{row['step_ms_high']:.2f}",
            f"{row['efficiency']:.1%}",
            f"{row['speedup']:.2f}",
            f"{row['overhead_ms']:.2f}",
            "" if row["bytes_sent_by_the_busiest"] is None else f"{row['bytes_sent_by_the_busiest'] / 1e6:.1f}",
            "" if row["hidden"] is None else f"{row['hidden']:.0%}",
            f"{row['accuracy']:.4f}",
        )
        for row in result["rows"]
    ]
    headers = [
        "algorithm",
        "step ms",
        "quartiles",
        "efficiency",
        "speedup",
        "overhead ms",
        "MB sent",
        "hidden",
        "accuracy",
    ]
    print(tabulate(table, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 8)))
    ranks_shown = [size for size in (2, 16, 128, 1024) if size <= options.simulate_ranks]
    print(
        f"\nSimulated, not measured: efficiency with this step of {result['baseline_step_ms']:.2f} ms and no overlap, "
        f"α = {ALPHA:g} s, β = {BETA:g} s/B, γ = {GAMMA:g} s/B"
    )
    efficiency = {(row["algorithm"], row["ranks"]): row["efficiency"] for row in result["simulated"]}
    table = [(name, *(f"{efficiency[name, size]:.1%}" for size in ranks_shown)) for name in SIMULATED]
    print(tabulate(table, headers=["algorithm", *(f"{size} ranks" for size in ranks_shown)], disable_numparse=True))
    if options.json is not None:
        write_json(options.json, result)
        print(f"\nresults: {options.json}")
    if options.plot is not None:
        plot(options.plot, result)
        print(f"plot:    {options.plot}")


if __name__ == "__main__":
    main()
