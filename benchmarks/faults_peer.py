"""What `faults.py` compares with: the same training by torch's DDP on Gloo, which begins anew from a checkpoint when
torchrun has restarted its ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_digits import digits, make_model

EVERY = 50  # steps between two checkpoints
BATCH = 16


def train(folder: Path) -> None:
    """Trains until it is ended, and writes a line for each step."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    data, _ = digits()
    images, labels = data[:]
    net, checkpoint, step = make_model(), folder / "checkpoint.pt", 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    model = nn.parallel.DistributedDataParallel(net)
    with (folder / f"{os.getpid()}.jsonl").open("w", buffering=1) as log:
        while True:
            generator = torch.Generator().manual_seed(step * size + rank)
            chosen = torch.randint(len(labels), (BATCH,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            step += 1
            record = {"at": time.time(), "process": os.getpid(), "rank": rank, "size": size, "step": step}
            log.write(json.dumps(record) + "\n")
            if rank == 0 and step % EVERY == 0:
                unfinished = checkpoint.with_suffix(".unfinished")
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, unfinished)
                unfinished.rename(checkpoint)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
