"""A small GPT over bytes, and the text that every machine has: the sources of Python's standard library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT, BATCH = 64, 8  # bytes of a sample; samples of a rank's batch


class Gpt(nn.Module):
    """Two pre-norm decoder layers; `forward` returns the mean cross-entropy of the next byte, in nats."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Parameter(torch.zeros(CONTEXT, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.embed(text[:, :-1]) + self.place
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), text[:, 1:].flatten())


def make_model() -> Gpt:
    """The same on every rank."""
    torch.manual_seed(0)
    return Gpt()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=False)


def batches(rank: int, steps: int, files: list[Path] | None = None) -> Iterator[Tensor]:
    """`steps` batches of this rank: int64 of shape (BATCH, CONTEXT + 1); of `files`, or of the library's sources."""
    sources = files or sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()]).long()
