"""One training step of four models: alone, under torch's DDP on Gloo and on ringred, and under ringred's own.

    python benchmarks/ddp_step.py --ranks 2 --json out/ddp-step.json

They take turns, step by step, on the same ranks with the same batches; `local` is the same step on all ranks
at once without communication, so that the overhead of the others is that of communication alone. All wrappers keep
gradients as views of their buckets. The C library is told to keep freed memory: otherwise pages are returned and
fetched again, and the page faults are counted for whichever system runs then. Memory is measured separately, without
that setting, in one set of processes per system. `peak` is the greatest resident set of a rank, in which a page that
ranks share counts fully for each of them; `share` divides a shared page equally among them (Linux's PSS), after the
last step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import KEEP_MEMORY, Spread, context, interleaved, memory_kib, on_ranks, rank_order, timed, write_json
from tabulate import tabulate
from torch import Tensor, nn

import ringred

SYSTEMS = ("local", "torch", "torch_on_ringred", "ringred")
BACKENDS = {"torch": "gloo", "torch_on_ringred": "ringred"}
Batch = tuple[Tensor, Tensor]


def mlp(width: int) -> tuple[nn.Module, Batch]:
    layers: list[nn.Module] = [nn.Linear(256, width), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10)), (torch.randn(128, 256), torch.randint(10, (128,)))


def cnn(width: int) -> tuple[nn.Module, Batch]:
    """VGG-like: six convolutions of 3x3, four poolings, two linear layers, on images of 32x32."""
    layers: list[nn.Module] = []
    channels = 3
    for out, pool in zip((1, 2, 4, 4, 8, 8), (True, True, False, True, False, True), strict=True):
        layers += [nn.Conv2d(channels, out * width, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = out * width
    layers += [nn.Flatten(), nn.Linear(channels * 4, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers), (torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))


class Gpt(nn.Module):
    """A decoder of 6 layers on a vocabulary of 256."""

    def __init__(self, width: int, context: int = 64) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 48, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.embed(tokens) + self.place, mask=self.mask, is_causal=True)
        logits: Tensor = self.head(hidden)
        return logits.transpose(1, 2)


def gpt(width: int) -> tuple[nn.Module, Batch]:
    tokens = torch.randint(256, (4, 65))
    return Gpt(width), (tokens[:, :-1], tokens[:, 1:])


class Lstm(nn.Module):
    """Two layers over 32 steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(256, width, 2, batch_first=True), nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(inputs)[0][:, -1])
        return output


def lstm(width: int) -> tuple[nn.Module, Batch]:
    return Lstm(width), (torch.randn(32, 32, 256), torch.randint(10, (32,)))


MODELS: dict[str, tuple[Callable[[int], tuple[nn.Module, Batch]], int]] = {
    "mlp": (mlp, 1200),
    "cnn": (cnn, 64),
    "gpt": (gpt, 432),
    "lstm": (lstm, 512),
}


def stepper(system: str, name: str, width: int) -> Callable[[], None]:
    """One training step of a fresh model, wrapped as `system` does. Collective."""
    torch.manual_seed(0)
    module, (inputs, targets) = MODELS[name][0](width)
    if system in BACKENDS:
        group = dist.new_group(backend=BACKENDS[system])
        module = nn.parallel.DistributedDataParallel(module, process_group=group, gradient_as_bucket_view=True)
    elif system == "ringred":
        module = ringred.DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        optimizer.step()

    return step


def rank_main(order: dict[str, Any]) -> None:
    """What one rank does: times all systems of one model, or measures the memory of one."""
    comm = ringred.init()
    backends = [BACKENDS[system] for system in order["systems"] if system in BACKENDS]
    if backends:
        dist.init_process_group(backends[0])
    steps = {system: stepper(system, order["model"], order["width"]) for system in order["systems"]}
    for _ in range(3):
        for step in steps.values():
            step()

    samples = interleaved({system: timed(comm, step) for system, step in steps.items()}, order["rounds"])
    table = torch.tensor([samples[system] for system in order["systems"]], dtype=torch.float64)
    comm.all_reduce(table, "max", algorithm="one_shot")
    memory = torch.tensor(memory_kib(), dtype=torch.float64)
    comm.all_reduce(memory, "max", algorithm="one_shot")
    if comm.rank == 0:
        write_json(Path(order["result"]), {"seconds": table.tolist(), "kib": memory.tolist()})
    if backends:
        dist.destroy_process_group()
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    for name, (_, width) in MODELS.items():
        parser.add_argument(f"--{name}-width", type=int, default=width)
    parser.add_argument("--rounds", type=int, default=25, help="steps of each system, in turn, a start")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        width = getattr(arguments, f"{name}_width")
        parameters = sum(p.numel() for p in MODELS[name][0](width)[0].parameters())
        starts = [
            on_ranks(
                __file__,
                arguments.ranks,
                KEEP_MEMORY,
                {"model": name, "width": width, "systems": SYSTEMS, "rounds": arguments.rounds},
            )["seconds"]
            for _ in range(arguments.starts)
        ]
        for at, system in enumerate(SYSTEMS):
            order = {"model": name, "width": width, "systems": [system], "rounds": 5}
            alone = on_ranks(__file__, arguments.ranks, {}, order)["kib"]
            step = Spread.of([second for start in starts for second in start[at]])
            # The overhead over the local step of the same round: a disturbance affects both.
            over = Spread.of([a / b - 1 for start in starts for a, b in zip(start[at], start[0], strict=True)])
            rows.append(
                {
                    "model": name,
                    "gradient_MB": parameters * 4 / 1e6,
                    "system": system,
                    "ranks": arguments.ranks,
                    "step_ms": step.median * 1e3,
                    "step_ms_quartiles": [step.low * 1e3, step.high * 1e3],
                    "overhead": over.median,
                    "overhead_quartiles": [over.low, over.high],
                    "peak_MiB": alone[0] / 1024,
                    "share_MiB": alone[1] / 1024,
                }
            )
    lines = [
        [
            row["model"],
            f"{row['gradient_MB']:.1f}",
            row["system"],
            f"{row['step_ms']:.2f}",
            f"{row['overhead']:+.1%}",
            "{:+.1%}..{:+.1%}".format(*row["overhead_quartiles"]),
            f"{row['peak_MiB']:.0f}",
            f"{row['share_MiB']:.0f}",
        ]
        for row in rows
    ]
    head = ["model", "gradients MB", "system", "step ms", "overhead", "quartiles", "peak MiB", "share MiB"]
    print(tabulate(lines, headers=head, disable_numparse=True))
    if arguments.json:
        write_json(arguments.json, context() | {"rows": rows})


if __name__ == "__main__":
    main() if (order := rank_order()) is None else rank_main(order)
