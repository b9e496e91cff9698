"""Fine-tuning with Accelerate on ringred: a small GPT that has learned Python learns English, in its last layers alone.

launch/torchrun.sh 2 examples/gpt/finetune.py
launch/torchrun.sh 2 examples/gpt/finetune.py --short

Both texts come with Python: the sources of its library, and its help. Gradients of two batches make one step.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from text_gpt import batches, make_model, make_optimizer
from torch import nn

HELP = [Path(pydoc_data.topics.__file__)]
ACCUMULATED = 2


def train(accelerator: Accelerator, model: nn.Module, steps: int, files: list[Path] | None) -> float:
    """Trains what is not frozen; returns the mean loss of the last tenth on this rank."""
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(model))
    losses = []
    for text in batches(accelerator.process_index, steps * ACCUMULATED, files):
        with accelerator.accumulate(wrapped):
            loss = wrapped(text)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--backend", default="ringred")
    parser.add_argument("--steps", type=int, default=400, help="of each part")
    parser.add_argument("--short", action="store_true", help="under a minute on two cores")
    options = parser.parse_args()
    if options.short:
        options.steps = 100

    dist.init_process_group(options.backend)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = make_model()
    python = train(accelerator, model, options.steps, None)
    with torch.no_grad():
        before = sum(model(text).item() for text in batches(99, 20, HELP)) / 20
    for frozen in (model.embed, model.layers[0]):
        frozen.requires_grad_(False)
    train(accelerator, model, options.steps, HELP)
    with torch.no_grad():
        after = sum(model(text).item() for text in batches(99, 20, HELP)) / 20
    if accelerator.is_main_process:
        learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) // 1000
        print(
            f"Python: loss {python:.2f}; English: {before:.2f}, and {after:.2f} after training {learned} k parameters"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
