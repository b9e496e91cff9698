"""Small models of several kinds, their data, and a few steps of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringred.communicator import Communicator

BATCH = 24


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3).to(memory_format=torch.channels_last)
        self.second = nn.Linear(6 * 36, 20)
        self.third = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)).flatten(1))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])


class TiedTransformer(nn.Module):
    """Token embedding and output projection share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.block = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :10] * 100).long().abs() % 16
        return self.head(self.block(self.embed(tokens))).mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": Convolutions, "lstm": Recurrent, "transformer": TiedTransformer}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (BATCH,), generator=generator)


def share(comm: Communicator) -> tuple[Tensor, Tensor]:
    images, labels = data()
    return images[comm.rank :: comm.size], labels[comm.rank :: comm.size]


def built(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind]().double()


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 3) -> list[Tensor]:
    """The gradients after `steps` steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


class Branches(nn.Module):
    """Uses the left branch, or both, or always leaves one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, both: bool) -> dict[str, Tensor]:
        return {"out": self.left(x) + (self.right(x) if both else 0)}
