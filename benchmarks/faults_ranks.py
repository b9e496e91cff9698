"""The ranks of `faults.py`: a training of digits that goes on after failures, or the cost of being able to."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import ringred

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_digits import digits, make_model

BLOCK = 20  # steps
COPIES = 3


def train(folder: Path, seconds: float) -> None:
    """Trains until `seconds` after the job began, and writes a line for each step."""
    ringred.init()
    torch.set_num_threads(1)
    began_at = folder / "began"
    data, test = digits()
    net = make_model()
    model = ringred.DistributedDataParallel(net, on_failure="shrink")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    sampler = ringred.ElasticSampler(data, 16, model)
    state = ringred.Elastic(model, optimizer, sampler)
    loader = DataLoader(data, batch_sampler=sampler)
    log = (folder / f"{os.getpid()}.jsonl").open("w", buffering=1)

    def write(**what: Any) -> None:
        record = {"at": time.time(), "process": os.getpid(), "rank": model.comm.rank, "size": model.comm.size, **what}
        log.write(json.dumps(record) + "\n")

    if not began_at.exists():
        began_at.write_text(str(time.time()))
    for _ in state.epochs(1_000_000):
        for images, labels in loader:
            optimizer.zero_grad()
            output = model(images)
            loss = F.cross_entropy(output, labels)
            loss.backward()
            optimizer.step()
            write(step=model.steps, loss=loss.item())
        over = torch.tensor([time.time() - float(began_at.read_text()) > seconds], dtype=torch.int64)
        if state.all_reduce(over, "max"):
            break
    net.eval()
    with torch.no_grad():
        images, labels = test[:]
        accuracy = (net(images).argmax(1) == labels).float().mean().item()
    weights = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
    assert model.recovery is not None
    write(
        step=model.steps,
        accuracy=round(accuracy, 4),
        weights=hashlib.sha256(weights).hexdigest(),
        recoveries=model.recovery.recoveries,
    )


def cost(out: Path, steps: int) -> None:
    """Blocks of steps of both wrappers of the same model, in turn: a rank that is done with a step before the others
    has only to wait for them in the next one. There are several copies of each, as copies of one kind differ by where
    their memory lies."""
    comm = ringred.init()
    torch.set_num_threads(1)
    models = {
        "MLP of 4 layers of 1024, batch 32": (nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)]), (32, 1024)),
        "digits CNN, batch 16": (make_model(), (16, 1, 8, 8)),
        "MLP of 2 layers of 64, batch 8": (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), (8, 64)),
    }
    order, found = random.Random(0), {}  # the same on all ranks
    for name, (net, shape) in models.items():
        hows = ("raise", "shrink") * COPIES
        wrapped = [ringred.DistributedDataParallel(copy.deepcopy(net), on_failure=how) for how in hows]
        x = torch.randn(shape)
        times: list[list[float]] = [[] for _ in wrapped]
        for turn in range(steps // BLOCK + 1):
            for at in order.sample(range(len(wrapped)), len(wrapped)):
                comm.barrier()
                began = time.perf_counter()
                for _ in range(BLOCK):
                    wrapped[at].zero_grad()
                    wrapped[at](x).square().mean().backward()
                comm.barrier()
                if turn:
                    times[at].append((time.perf_counter() - began) / BLOCK * 1e3)
        found[name] = {
            how: [statistics.mean(turn) for turn in zip(*times[at::2], strict=True)] for at, how in enumerate(hows[:2])
        }
    if comm.rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--cost", type=int)
    options = parser.parse_args()
    if options.cost:
        cost(options.place, options.cost)
    else:
        train(options.place, options.seconds)
