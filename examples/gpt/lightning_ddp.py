"""Lightning on ringred: one argument of its DDP strategy.

launch/torchrun.sh 2 examples/gpt/lightning_ddp.py --steps 100
"""

from __future__ import annotations

import argparse
import os

import lightning
from lightning.pytorch.strategies import DDPStrategy
from text_gpt import batches, make_model, make_optimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader


class Training(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, text: Tensor, step: int) -> Tensor:
        loss: Tensor = self.model(text)
        if self.global_rank == 0 and (step == 0 or (step + 1) % 20 == 0):
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return make_optimizer(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="ringred")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=DDPStrategy(process_group_backend=options.backend, gradient_as_bucket_view=True),
        max_steps=options.steps,
        use_distributed_sampler=False,  # each rank draws its own batches
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = list(batches(int(os.environ.get("RANK", "0")), options.steps))
    trainer.fit(Training(), DataLoader(data, batch_size=None))


if __name__ == "__main__":
    main()
