"""ResNet-18 on synthetic images, by ringred's DistributedDataParallel, with BatchNorm over the batches of all ranks.

ringred run --ranks 2 examples/resnet.py
ringred run --ranks 2 examples/resnet.py --short

Images of ten classes: a class is a texture of two waves, under noise and at a random place, which a linear model cannot
tell apart.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred

CLASSES = 10


class Block(nn.Module):
    """Two convolutions of 3 × 3 beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_first, self.norm_second = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, images: Tensor) -> Tensor:
        found = F.relu(self.norm_first(self.first(images)))
        return F.relu(self.norm_second(self.second(found)) + self.shortcut(images))


def resnet18(width: int) -> nn.Module:
    """He et al. 2016, table 1, for images of 32 × 32; `width` is 64 there."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage in range(4):
        before = width * 2 ** max(0, stage - 1)
        layers += [
            Block(before, width * 2**stage, 1 if stage == 0 else 2),
            Block(width * 2**stage, width * 2**stage, 1),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 8, CLASSES))


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (size, 3, 32, 32) of float32, and their classes."""
    labels = torch.randint(CLASSES, (size,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angle = labels * math.pi / CLASSES
    shift = 2 * math.pi * torch.rand(size, 2, generator=generator)
    along = rows * angle.cos()[:, None, None] + columns * angle.sin()[:, None, None]
    across = columns * angle.cos()[:, None, None] - rows * angle.sin()[:, None, None]
    texture = (along * 0.9 + shift[:, :1, None]).sin() * (across * 0.3 + shift[:, 1:, None]).sin()
    noise = torch.randn(size, 3, 32, 32, generator=generator)
    return texture[:, None] + 0.7 * noise, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="of each rank")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--short", action="store_true", help="a narrow one, and few steps: under a minute on two cores")
    options = parser.parse_args()
    if options.short:
        options.steps, options.batch, options.width = 60, 16, 12

    comm = ringred.init()
    torch.manual_seed(0)
    net = ringred.SyncBatchNorm.convert_sync_batchnorm(resnet18(options.width))
    model = ringred.DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=options.steps)
    generator = torch.Generator().manual_seed(1 + comm.rank)
    began = time.monotonic()
    for step in range(1, options.steps + 1):
        images, labels = batch(options.batch, generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        rates.step()
        if comm.rank == 0 and step % (options.steps // 5) == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    seconds = time.monotonic() - began

    model.eval()
    right = torch.zeros(2)
    with torch.no_grad():
        for _ in range(4):  # other images on each rank
            images, labels = batch(64, generator)
            right += torch.tensor([(model(images).argmax(1) == labels).sum(), len(labels)])
    comm.all_reduce(right)
    if comm.rank == 0:
        millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        print(f"{comm.size} ranks, {millions:.1f} M parameters: accuracy {right[0] / right[1]:.3f} in {seconds:.0f} s")
        print(model.overlap_report())


if __name__ == "__main__":
    main()
