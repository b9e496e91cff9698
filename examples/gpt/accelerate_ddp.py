"""Accelerate on ringred: it keeps a process group that exists already. So does the Hugging Face Trainer, which uses it.

launch/torchrun.sh 2 examples/gpt/accelerate_ddp.py --steps 100
"""

from __future__ import annotations

import argparse

import torch.distributed as dist
from accelerate import Accelerator
from text_gpt import batches, make_model, make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="ringred")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    dist.init_process_group(options.backend)
    accelerator = Accelerator(cpu=True)
    model = make_model()
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    for step, text in enumerate(batches(accelerator.process_index, options.steps), 1):
        loss = model(text)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if accelerator.is_main_process and (step == 1 or step % 20 == 0):
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
