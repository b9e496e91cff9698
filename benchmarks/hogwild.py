"""Sparse logistic regression by several processes that share the weights without locks, beside one process.

    python benchmarks/hogwild.py --json out/hogwild.json

Synthetic data: 20,000 rows with 20 of 10,000 features each, labels by a hidden weight vector with noise. Each process
takes rows of its own; all take the same number of steps in sum. The loss is the mean over all rows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Spread, context, on_ranks, rank_order, write_json
from tabulate import tabulate
from torch import Tensor, nn

import ringred
from ringred.parameter_server.hogwild import Hogwild

ROWS, FEATURES, PRESENT, BATCH = 20_000, 10_000, 20, 4


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(FEATURES, (ROWS, PRESENT), generator=generator)
    hidden = torch.randn(FEATURES, generator=generator)
    chance = torch.sigmoid(2 * hidden[features].sum(1) / PRESENT**0.5)
    return features, torch.bernoulli(chance, generator=generator)


def loss_of(model: nn.EmbeddingBag, features: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(features).squeeze(1), labels)


def rank_main(order: dict[str, Any]) -> None:
    comm = ringred.init()
    features, labels = data()
    torch.manual_seed(0)
    model = nn.EmbeddingBag(FEATURES, 1, mode="sum", sparse=True)
    nn.init.zeros_(model.weight)
    generator = torch.Generator().manual_seed(comm.rank)
    steps = order["steps"] // comm.size
    with Hogwild(model, lr=order["rate"], comm=comm) as hogwild:
        comm.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            rows = comm.rank + comm.size * torch.randint(ROWS // comm.size, (BATCH,), generator=generator)
            loss_of(model, features[rows], labels[rows]).backward()
            hogwild.step()
        comm.barrier()
        seconds = time.perf_counter() - began
        total = hogwild.total_steps()
    with torch.no_grad():
        loss = loss_of(model, features, labels).item()
    if comm.rank == 0:
        write_json(Path(order["result"]), {"steps": total, "per_second": total / seconds, "loss": loss})
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[int, list[dict[str, Any]]] = {processes: [] for processes in options.processes}
    for _ in range(options.starts):
        for processes, runs in found.items():
            runs.append(on_ranks(__file__, processes, {}, {"steps": options.steps, "rate": options.rate}))
    rows = []
    for processes, runs in found.items():
        speed = Spread.of([run["per_second"] for run in runs])
        losses = Spread.of([run["loss"] for run in runs])
        rows.append({"processes": processes, "steps": runs[0]["steps"], "per_second": speed, "loss": losses})
    at_start = F.binary_cross_entropy_with_logits(torch.zeros(ROWS), data()[1]).item()
    table = [
        (
            row["processes"],
            row["steps"],
            f"{row['per_second'].median:.0f}",
            f"{row['loss'].low:.4f}..{row['loss'].high:.4f}",
        )
        for row in rows
    ]
    print(f"loss at the start {at_start:.4f}")
    print(tabulate(table, headers=["processes", "steps", "steps per second", "loss"]))
    if options.json is not None:
        write_json(options.json, context() | {"loss_at_start": at_start, "rows": rows})


if __name__ == "__main__":
    order = rank_order()
    if order is None:
        main()
    else:
        rank_main(order)
