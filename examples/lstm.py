"""An LSTM that continues sums, character by character, on texts of different lengths.

ringred run --ranks 2 examples/lstm.py
ringred run --ranks 2 examples/lstm.py --short

Ranks have batches of as many texts, but not of as many characters: `weigh` makes of the gradients the mean over all
characters of all ranks, as one process with the whole batch would have it.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred

ALPHABET = "0123456789+=\n"
PADDING = len(ALPHABET)  # of shorter texts of a batch; no prediction of it counts


class Model(nn.Module):
    """Two layers, which see the characters so far."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET) + 1, width, padding_idx=PADDING)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, texts: Tensor) -> Tensor:
        """Of characters (batch, length) the scores of each next one (batch, length, alphabet)."""
        scores: Tensor = self.head(self.lstm(self.embed(texts))[0])
        return scores


def batch(size: int, digits: int, generator: torch.Generator) -> Tensor:
    """Texts such as "41+7=48\\n" as numbers (size, length), padded at the end."""
    places = 10 ** torch.randint(1, digits + 1, (size, 2), generator=generator)
    terms = (torch.rand(size, 2, generator=generator) * places).long()
    texts = [f"{one}+{other}={one + other}\n" for one, other in terms.tolist()]
    rows = [torch.tensor([ALPHABET.index(character) for character in text]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


def loss_of(model: nn.Module, texts: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss of the characters after the first, and the part of the answers' characters that were right."""
    given, wanted = texts[:, :-1], texts[:, 1:]
    scores = model(given)
    loss = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=PADDING)
    answer = (texts == ALPHABET.index("=")).cumsum(1)[:, :-1].bool() & (wanted != PADDING)
    return loss, (scores.argmax(2) == wanted)[answer].float().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--digits", type=int, default=2, help="of each number, at most")
    parser.add_argument("--short", action="store_true", help="numbers of one digit: under a minute on two cores")
    options = parser.parse_args()
    if options.short:
        options.steps, options.width, options.digits = 300, 96, 1

    comm = ringred.init()
    torch.manual_seed(0)
    model = ringred.DistributedDataParallel(Model(options.width))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=options.steps)
    generator = torch.Generator().manual_seed(1 + comm.rank)
    began = time.monotonic()
    for step in range(1, options.steps + 1):
        texts = batch(64, options.digits, generator)
        model.weigh(int((texts[:, 1:] != PADDING).sum()))
        optimizer.zero_grad()
        loss, right = loss_of(model, texts)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if comm.rank == 0 and step % (options.steps // 5) == 0:
            print(f"step {step}: loss {loss.item():.3f}, {right.item():.0%} of the answers' characters", flush=True)
    with torch.no_grad():
        _, right = loss_of(model.module, batch(1000, options.digits, generator))
    comm.all_reduce(right, "avg")
    if comm.rank == 0:
        seconds = time.monotonic() - began
        print(f"{comm.size} ranks: {right.item():.1%} of the characters of new answers are right, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
