"""torch's own DistributedDataParallel on ringred: the word in `init_process_group` is all there is to it.

launch/torchrun.sh 2 examples/gpt/torch_ddp.py --steps 100
"""

from __future__ import annotations

import argparse

import torch.distributed as dist
from text_gpt import batches, make_model, make_optimizer
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="ringred")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    dist.init_process_group(options.backend)
    rank = dist.get_rank()
    model = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
    optimizer = make_optimizer(model)
    for step, text in enumerate(batches(rank, options.steps), 1):
        loss = model(text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step == 1 or step % 20 == 0):
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
