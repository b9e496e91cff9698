"""Trains a small CNN on scikit-learn's handwritten digits, data-parallel on any number of ranks.

python examples/train_digits.py                                       # one rank
launch/mpirun.sh 2 examples/train_digits.py --algorithm torus         # two, by MPI
launch/torchrun.sh 4 examples/train_digits.py --algorithm ring        # four, by torchrun
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import ringred

BATCH = 24  # per rank
BUCKET_CAP_MB = 0.05  # the model is small: four buckets, so that there is something to overlap


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 scanned digits of 8×8 pixels: four fifths to train on, one fifth to test."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    cut = len(labels) * 4 // 5
    return TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:])


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def learning_rate(step: float, ranks: int, steps_per_epoch: int, epochs: int) -> float:
    """The linear-scaling rule with gradual warm-up (Goyal et al. 2017), then a linear decay to zero.

    torch's SGD keeps the rate out of its momentum, so that a changing rate needs no momentum correction.
    """
    base, warm_up = 0.03, 3 * steps_per_epoch
    scaled = base * ranks
    if step < warm_up:
        return base + (scaled - base) * step / warm_up
    return scaled * max(0.0, 1 - (step - warm_up) / max(1, epochs * steps_per_epoch - warm_up))


def accuracy(model: nn.Module, test: TensorDataset, comm: ringred.Communicator) -> float:
    """The share of test images that the model gets right; each rank looks at its part."""
    images, labels = test.tensors
    model.eval()
    with torch.no_grad():
        right = (model(images[comm.rank :: comm.size]).argmax(1) == labels[comm.rank :: comm.size]).sum()
    model.train()
    comm.all_reduce(right)
    return right.item() / len(labels)


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Writes the checkpoint whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, unfinished)
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--algorithm", default="auto", help=f"auto, {', '.join(ringred.algorithms('all_reduce'))}")
    parser.add_argument("--grid", help="of the torus, such as 2x2")
    parser.add_argument("--checkpoint", type=Path, help="file, seen by all ranks, to save after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    grid = tuple(int(extent) for extent in options.grid.split("x")) if options.grid else None

    comm = ringred.init()
    train, test = digits()
    model = ringred.DistributedDataParallel(
        make_model(), process_group=comm, bucket_cap_mb=BUCKET_CAP_MB, algorithm=options.algorithm, grid=grid
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    sampler = DistributedSampler(train, num_replicas=comm.size, rank=comm.rank, seed=1)
    loader = DataLoader(train, batch_size=BATCH, sampler=sampler, drop_last=True)

    first = 0
    if options.resume and options.checkpoint.exists():
        state = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]

    began = time.monotonic()
    loss: Tensor = torch.zeros(())
    sent_before = comm.counters.bytes_sent
    epochs = tqdm(range(first, options.epochs), desc=f"{options.algorithm} on {comm.size}", disable=comm.rank != 0)
    for epoch in epochs:
        sampler.set_epoch(epoch)
        for index, (images, labels) in enumerate(loader):
            for group in optimizer.param_groups:
                step = epoch * len(loader) + index
                group["lr"] = learning_rate(step, comm.size, len(loader), options.epochs)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        if comm.rank == 0:
            epochs.set_postfix(loss=f"{loss.item():.4f}")
            if options.checkpoint is not None:
                save(options.checkpoint, model, optimizer, epoch + 1)
    seconds = time.monotonic() - began
    sent = comm.counters.bytes_sent - sent_before

    reached = accuracy(model, test, comm)
    if comm.rank == 0:
        print(f"{comm.size} ranks, {options.algorithm}: test accuracy {reached:.4f} after {seconds:.1f} s")
        result = {
            "ranks": comm.size,
            "algorithm": options.algorithm,
            "grid": options.grid,
            "transport": comm.transport.name,
            "epochs": options.epochs,
            "accuracy": reached,
            "seconds": seconds,
            "bytes_sent": sent,
        }
        if options.epochs > first:
            report = model.overlap_report()
            print(report)
            result["overlap"] = report.as_dict()
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    comm.close()


if __name__ == "__main__":
    main()
