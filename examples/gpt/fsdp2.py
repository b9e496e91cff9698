"""FSDP2 on ringred: parameters, gradients and optimizer states are shards, gathered layer by layer.

launch/torchrun.sh 2 examples/gpt/fsdp2.py --steps 100
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from text_gpt import batches, make_model, make_optimizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="ringred")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    dist.init_process_group(options.backend)
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    model = make_model()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model)
    for step, text in enumerate(batches(rank, options.steps), 1):
        loss = model(text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step == 1 or step % 20 == 0):
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    whole = sum(parameter.numel() for parameter in model.parameters())
    mine = sum(parameter.to_local().numel() for parameter in model.parameters())
    dist.all_reduce(torch.tensor(mine))
    print(f"rank {rank} held {mine} of {whole} parameters", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
