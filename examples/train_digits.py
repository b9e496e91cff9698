"""Trains a small CNN on scikit-learn's handwritten digits, data-parallel on any number of ranks.

python examples/train_digits.py                                       # one rank
launch/mpirun.sh 2 examples/train_digits.py --algorithm torus         # two, by MPI
launch/torchrun.sh 4 examples/train_digits.py --algorithm ring        # four, by torchrun
launch/torchrun.sh 2 examples/train_digits.py --hook power_sgd        # gradients as two thin factors
launch/torchrun.sh 4 examples/train_digits.py --policy k_async:3      # parameters on servers, three of four waited for

With --checkpoint and --resume it goes on where it was when a rank died, and with --deterministic as well to the bit:

TORCHRUN_ARGS="--standalone --max-restarts 3" \\
    launch/torchrun.sh 2 examples/train_digits.py --checkpoint out/digits.pt --resume --deterministic
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import ringred
from ringred import hooks
from ringred.optim import LinearScaling
from ringred.parameter_server.policies import parse

BATCH = 24  # per rank
BASE_RATE = 0.03  # for one rank
SERVER_RATE = 0.1  # for each gradient of an update, on a parameter server without momentum
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


HOOKS: dict[str, Callable[[ringred.Communicator, torch.optim.Optimizer], hooks.Policy]] = {
    "fp16": lambda comm, optimizer: hooks.Half(comm),
    "bf16": lambda comm, optimizer: hooks.Half(comm, torch.bfloat16),
    "int8": lambda comm, optimizer: hooks.Int8(comm),
    "top_k": lambda comm, optimizer: hooks.TopK(comm, ratio=0.01),
    "power_sgd": lambda comm, optimizer: hooks.PowerSGD(comm, rank=2),
    "local_sgd": lambda comm, optimizer: hooks.LocalSGD(comm, optimizer, start=100, period=4),
    "fused": hooks.FusedOptimizer,
}


def schedule_of(optimizer: torch.optim.Optimizer, ranks: int, steps_per_epoch: int, epochs: int) -> LinearScaling:
    """The linear-scaling rule with a warm-up over three epochs, then a linear decay to zero."""
    warm_up, last = 3 * steps_per_epoch, epochs * steps_per_epoch

    def decay(step: int) -> float:
        return max(0.0, 1 - (step - warm_up) / max(1, last - warm_up))

    return LinearScaling(optimizer, batch=ranks * BATCH, reference=BATCH, warm_up=warm_up, then=decay)


def accuracy(model: nn.Module, test: TensorDataset, comm: ringred.Communicator) -> float:
    """The share of test images that the model gets right; each rank looks at its part."""
    images, labels = test.tensors
    model.eval()
    with torch.no_grad():
        right = (model(images[comm.rank :: comm.size]).argmax(1) == labels[comm.rank :: comm.size]).sum()
    model.train()
    comm.all_reduce(right)
    return right.item() / len(labels)


def on_servers(
    comm: ringred.Communicator, train: TensorDataset, name: str, epochs: int, *, quiet: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, trained on a parameter server in the ranks, under the policy `name`, and what to tell of it.

    As many mini-batches as in `epochs` epochs; asynchronous policies make more and smaller updates of them. Momentum is
    left out, because delay has the same effect (Mitliagkas et al., Asynchrony Begets Momentum, 2016).
    """
    policy, model = parse(name), make_model()
    batch = policy.gradients_per_update(comm.size)
    sampler = DistributedSampler(train, num_replicas=comm.size, rank=comm.rank, seed=1)
    loader = DataLoader(train, batch_size=BATCH, sampler=sampler, drop_last=True)
    updates = max(1, epochs * len(loader) * comm.size // batch)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=SERVER_RATE * batch, weight_decay=1e-4)

    def rates(stepper: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.MultiStepLR(stepper, [updates * 3 // 4], gamma=0.2)

    began = time.monotonic()
    options: dict[str, Any] = {"schedule": rates, "updates": updates, "comm": comm}
    with ringred.ParameterServer(model, optimizer, policy, **options) as server:
        with tqdm(total=updates, desc=f"{policy} on {comm.size}", disable=quiet or not shown(comm)) as bar:
            for epoch in itertools.count():  # until the server says that all updates are made
                sampler.set_epoch(epoch)
                for images, labels in loader:
                    if not server.pull():
                        break
                    bar.update(server.version - bar.n)
                    F.cross_entropy(model(images), labels).backward()
                    server.push()
                if server.over:
                    break
        report = server.report()
    if comm.rank == 0 and not quiet:
        print(report)
    found = {"policy": name, "mean_staleness": report.mean_staleness, "updates": report.updates}
    return model, found | {"seconds": time.monotonic() - began, "rate": SERVER_RATE * batch}


def save(path: Path, epoch: int, **parts: Any) -> None:
    """Writes the checkpoint whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in parts.items()}}, unfinished)
    unfinished.replace(path)


def shown(comm: ringred.Communicator) -> bool:
    """Whether this rank shows its progress: mpirun passes on to a terminal what ranks write to a pipe (`--bar`)."""
    return comm.rank == 0 and (sys.stderr.isatty() or "--bar" in sys.argv)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--algorithm", default="auto", help=f"auto, {', '.join(ringred.algorithms('all_reduce'))}")
    parser.add_argument("--grid", help="of the torus, such as 2x2")
    parser.add_argument("--hook", choices=HOOKS, help="what reduces gradients, instead of an all-reduce")
    parser.add_argument("--policy", help="train on a parameter server: sync, async, k_async:3, soft_sync:2, ...")
    parser.add_argument("--deterministic", action="store_true", help="the same bits from any algorithm and buckets")
    parser.add_argument("--checkpoint", type=Path, help="file, seen by all ranks, to save after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--bar", action="store_true", help="show progress, where the launcher has a terminal")
    options = parser.parse_args()
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    grid = tuple(int(extent) for extent in options.grid.split("x")) if options.grid else None

    if options.checkpoint is not None:
        options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    comm = ringred.init()
    train, test = digits()
    if options.policy is not None:
        trained, result = on_servers(comm, train, options.policy, options.epochs)
        result |= {"ranks": comm.size, "accuracy": accuracy(trained, test, comm)}
        if comm.rank == 0:
            print(f"{comm.size} ranks, {options.policy}: test accuracy {result['accuracy']:.4f}")
            write_result(options.json, result)
        comm.close()
        return
    model = ringred.DistributedDataParallel(
        make_model(),
        process_group=comm,
        bucket_cap_mb=BUCKET_CAP_MB,
        algorithm=options.algorithm,
        grid=grid,
        deterministic=options.deterministic,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=BASE_RATE, momentum=0.9, weight_decay=1e-4)
    sampler = DistributedSampler(train, num_replicas=comm.size, rank=comm.rank, seed=1)
    loader = DataLoader(train, batch_size=BATCH, sampler=sampler, drop_last=True)
    schedule = schedule_of(optimizer, comm.size, len(loader), options.epochs)
    policy = None
    if options.hook is not None:
        policy = HOOKS[options.hook](comm, optimizer)
        model.register_comm_hook(policy, hooks.comm_hook)

    first = 0
    if options.resume and options.checkpoint.exists():
        state = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]

    began = time.monotonic()
    loss: Tensor = torch.zeros(())
    counters = comm.counters if policy is None else policy.counters
    sent_before = counters.bytes_sent
    what = f"{options.algorithm} on {comm.size}"
    epochs = tqdm(range(first, options.epochs), desc=what, unit="epoch", ncols=80, disable=not shown(comm))
    for epoch in epochs:
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            if options.hook != "fused":  # which has stepped within backward
                optimizer.step()
            schedule.step()
        if comm.rank == 0:
            epochs.set_postfix(loss=f"{loss.item():.4f}")
            if options.checkpoint is not None:
                save(options.checkpoint, epoch + 1, model=model, optimizer=optimizer, schedule=schedule)
    seconds = time.monotonic() - began
    sent = counters.bytes_sent - sent_before

    reached = accuracy(model, test, comm)
    if comm.rank == 0:
        print(f"{comm.size} ranks, {options.algorithm}: test accuracy {reached:.4f} after {seconds:.1f} s")
        result = {
            "ranks": comm.size,
            "algorithm": options.algorithm,
            "grid": options.grid,
            "hook": options.hook,
            "deterministic": options.deterministic,
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
        write_result(options.json, result)
    comm.close()


if __name__ == "__main__":
    main()
