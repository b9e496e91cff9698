"""Communication hooks: bytes that a rank sends for one step, relative to an all-reduce, and the time of a step.

    python benchmarks/gradient_compression.py --ranks 2 --json out/compression.json

The models are those of ddp_step.py. Within a host, memory is faster than the arithmetic of compression, which
therefore costs time. Between hosts, the saving follows from the bytes: `link ms` is their time at 1 Gbit/s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ddp_step import MODELS
from harness import KEEP_MEMORY, Spread, context, interleaved, on_ranks, rank_order, write_json
from tabulate import tabulate

import ringred
from ringred import hooks

_LINK = 125e6  # bytes a second
HOOKS: dict[str, Callable[[ringred.Communicator], hooks.Policy] | None] = {
    "all_reduce": None,
    "fp16": hooks.Half,
    "bf16": lambda comm: hooks.Half(comm, torch.bfloat16),
    "int8": hooks.Int8,
    "top_k 1%": lambda comm: hooks.TopK(comm, 0.01),
    "power_sgd 2": lambda comm: hooks.PowerSGD(comm, 2),
}


def rank_main(order: dict[str, Any]) -> None:
    comm = ringred.init()
    steps, counters = {}, {}
    for name, make in HOOKS.items():
        torch.manual_seed(0)
        module, (inputs, targets) = MODELS[order["model"]][0](order["width"])
        model = ringred.DistributedDataParallel(module, algorithm="direct", gradient_as_bucket_view=True)
        counters[name] = comm.counters
        if make is not None:
            policy = make(comm)
            model.register_comm_hook(policy, hooks.comm_hook)
            counters[name] = policy.counters
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step(model: Any = model, optimizer: Any = optimizer, inputs: Any = inputs, targets: Any = targets) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        steps[name] = step
    sent: dict[str, list[int]] = {name: [] for name in steps}

    def timed(name: str) -> Callable[[], float]:
        def measure() -> float:
            comm.barrier()
            before, began = counters[name].bytes_sent, time.perf_counter()
            steps[name]()
            took = time.perf_counter() - began
            sent[name].append(counters[name].bytes_sent - before)
            return took

        return measure

    interleaved({name: timed(name) for name in steps}, 3)  # warm-up: buckets are laid out anew
    samples = interleaved({name: timed(name) for name in steps}, order["rounds"])
    table = torch.tensor([samples[name] for name in steps], dtype=torch.float64)
    comm.all_reduce(table, "max", algorithm="one_shot")
    if comm.rank == 0:
        write_json(Path(order["result"]), {"seconds": table.tolist(), "bytes": [sent[name][-1] for name in steps]})
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["mlp", "gpt"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        order = {"model": model, "width": MODELS[model][1], "rounds": arguments.rounds}
        found = on_ranks(__file__, arguments.ranks, KEEP_MEMORY, order)
        for name, seconds, sent in zip(HOOKS, found["seconds"], found["bytes"], strict=True):
            step = Spread.of(seconds)
            rows.append(
                {
                    "model": model,
                    "hook": name,
                    "ranks": arguments.ranks,
                    "bytes": sent,
                    "of_all_reduce": sent / found["bytes"][0],
                    "link_ms": sent / _LINK * 1e3,
                    "step_ms": step.median * 1e3,
                    "step_ms_quartiles": [step.low * 1e3, step.high * 1e3],
                }
            )
    lines = [
        [
            row["model"],
            row["hook"],
            row["bytes"],
            f"{row['of_all_reduce']:.2%}",
            f"{row['link_ms']:.1f}",
            f"{row['step_ms']:.1f}",
            "{:.1f}..{:.1f}".format(*row["step_ms_quartiles"]),
        ]
        for row in rows
    ]
    head = ["model", "hook", "bytes sent", "of all-reduce", "link ms", "step ms", "quartiles"]
    print(tabulate(lines, headers=head, disable_numparse=True))
    if arguments.json:
        write_json(arguments.json, context() | {"rows": rows})


if __name__ == "__main__":
    main() if (order := rank_order()) is None else rank_main(order)
