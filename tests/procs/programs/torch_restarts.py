"""torch's DDP on the backend "ringred", trained with checkpoints; in its first life one rank is killed in mid-backward.

argv: the folder of checkpoints, and the step at which rank 1 dies (−1: never). Prints what each life did.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

STEPS = 8


def say(**facts):
    print(
        json.dumps({"life": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), **facts}) + "\n", end="", flush=True
    )


def main():
    folder, dies_at = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("ringred")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    saved, begin = folder / "last.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    say(rank=rank, begins=begin)

    def killed(gradient):
        say(rank=rank, dies=time.time())
        os.kill(os.getpid(), signal.SIGKILL)

    for step in range(begin, STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        inputs, targets = torch.randn(32, 64, generator=generator), torch.randint(8, (32,), generator=generator)
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        if rank == 1 and step == dies_at and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            model.module[0].weight.register_hook(killed)
        try:
            loss.backward()
        except RuntimeError as error:
            say(rank=rank, raised=time.time(), error=str(error))
            raise
        optimizer.step()
        if rank == 0:
            torch.save(
                {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, saved
            )
        dist.barrier()
    say(rank=rank, done=sum(p.double().sum().item() for p in model.parameters()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
