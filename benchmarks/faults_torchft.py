"""What `faults.py` compares with: one replica of the same training under torchft, which goes on without those that died
and takes their successors in.

python faults_torchft.py FOLDER REPLICA LIGHTHOUSE SECONDS
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchft import Manager, Optimizer, ProcessGroupGloo

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_digits import digits, make_model

BATCH = 16


def train(folder: Path, replica: int, lighthouse: str, patience: timedelta) -> None:
    """Trains until it is ended, and writes a line for each step. It waits at most `patience` for anything."""
    torch.set_num_threads(1)
    data, _ = digits()
    images, labels = data[:]
    net = make_model()
    inner = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def load(state: dict[str, Any]) -> None:
        net.load_state_dict(state["net"])
        inner.load_state_dict(state["optimizer"])

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=patience),
        load_state_dict=load,
        state_dict=lambda: {"net": net.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        timeout=patience,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"digits_{replica}_",
    )
    optimizer = Optimizer(manager, inner)
    with (folder / f"{os.getpid()}.jsonl").open("w", buffering=1) as log:
        while True:
            generator = torch.Generator().manual_seed(manager.current_step() * 4 + replica)
            chosen = torch.randint(len(labels), (BATCH,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            # Its DistributedDataParallel ends with an AssertionError where a peer died (0.2.0, Gloo, torch 2.13).
            for work in [manager.allreduce(each.grad) for each in net.parameters()]:
                work.wait()
            before = manager.current_step()
            optimizer.step()
            if manager.current_step() > before:  # else somebody died in it
                size, step = manager.num_participants(), manager.current_step()
                record = {"at": time.time(), "process": os.getpid(), "rank": replica, "size": size, "step": step}
                log.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], timedelta(seconds=float(sys.argv[4])))
