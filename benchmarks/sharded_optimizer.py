"""A training step with Adam: DistributedDataParallel with the whole optimizer on every rank, and sharded (ZeRO-1).

    python benchmarks/sharded_optimizer.py --ranks 2 --json out/sharded-optimizer.json

Both take turns, step by step, on the same ranks; `ratio` compares their times of the same round. The optimizer's
memory is the size of its state tensors; the ranks' memory is that of the operating system, in one set of processes per
kind of optimizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ddp_step import MODELS
from harness import KEEP_MEMORY, Spread, context, interleaved, memory_kib, on_ranks, rank_order, timed, write_json
from tabulate import tabulate
from torch import Tensor

import ringred
from ringred.optim import ShardedOptimizer

KINDS = ("adam", "sharded adam")


def state_bytes(optimizer: Any) -> int:
    """The bytes of the optimizer's state on this rank."""
    states = optimizer.kept() if isinstance(optimizer, ShardedOptimizer) else optimizer.state.values()
    held = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in held)


def rank_main(order: dict[str, Any]) -> None:
    comm = ringred.init()
    steps: dict[str, Callable[[], None]] = {}
    optimizers: dict[str, Any] = {}
    for kind in order["kinds"]:
        torch.manual_seed(0)
        module, (inputs, targets) = MODELS[order["model"]][0](order["width"])
        model = ringred.DistributedDataParallel(module, gradient_as_bucket_view=True)
        optimizer: Any = (
            torch.optim.Adam(model.parameters()) if kind == "adam" else ShardedOptimizer(model, torch.optim.Adam)
        )

        def step(model: Any = model, optimizer: Any = optimizer, inputs: Any = inputs, targets: Any = targets) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        steps[kind], optimizers[kind] = step, optimizer

    interleaved({kind: timed(comm, step) for kind, step in steps.items()}, 3)
    samples = interleaved({kind: timed(comm, step) for kind, step in steps.items()}, order["rounds"])
    table = torch.tensor([samples[kind] for kind in steps], dtype=torch.float64)
    comm.all_reduce(table, "max", algorithm="one_shot")
    memory = torch.tensor([*memory_kib(), *map(state_bytes, optimizers.values())], dtype=torch.float64)
    comm.all_reduce(memory, "max", algorithm="one_shot")
    if comm.rank == 0:
        kib, state = memory[:2].tolist(), memory[2:].tolist()
        write_json(Path(order["result"]), {"seconds": table.tolist(), "kib": kib, "state": state})
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["mlp", "gpt"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        order = {"model": model, "width": MODELS[model][1], "rounds": arguments.rounds, "kinds": KINDS}
        starts = [on_ranks(__file__, arguments.ranks, KEEP_MEMORY, order) for _ in range(arguments.starts)]
        for at, kind in enumerate(KINDS):
            kib = on_ranks(__file__, arguments.ranks, {}, order | {"rounds": 5, "kinds": [kind]})["kib"]
            step = Spread.of([second for start in starts for second in start["seconds"][at]])
            pairs = [pair for s in starts for pair in zip(s["seconds"][at], s["seconds"][0], strict=True)]
            ratio = Spread.of([mine / whole for mine, whole in pairs])
            rows.append(
                {
                    "model": model,
                    "optimizer": kind,
                    "ranks": arguments.ranks,
                    "step_ms": step.median * 1e3,
                    "ratio": ratio.median,
                    "ratio_quartiles": [ratio.low, ratio.high],
                    "state_MiB": starts[0]["state"][at] / (1 << 20),
                    "peak_MiB": kib[0] / 1024,
                    "share_MiB": kib[1] / 1024,
                }
            )
    lines = [
        [
            row["model"],
            row["optimizer"],
            f"{row['step_ms']:.1f}",
            f"{row['ratio']:.3f}",
            "{:.3f}..{:.3f}".format(*row["ratio_quartiles"]),
            f"{row['state_MiB']:.1f}",
            f"{row['peak_MiB']:.0f}",
            f"{row['share_MiB']:.0f}",
        ]
        for row in rows
    ]
    head = ["model", "optimizer", "step ms", "ratio", "quartiles", "state MiB", "peak MiB", "share MiB"]
    print(tabulate(lines, headers=head, disable_numparse=True))
    if arguments.json:
        write_json(arguments.json, context() | {"rows": rows})


if __name__ == "__main__":
    main() if (order := rank_order()) is None else rank_main(order)
