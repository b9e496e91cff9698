"""Which of torch's optimizers can be given any part of a parameter."""

from __future__ import annotations

import torch

__all__ = ["ELEMENTWISE"]

ELEMENTWISE = frozenset(
    {
        *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam),
        *(torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD),
        torch.optim.Rprop,
    }
)
"""They update an element by that element's gradient and state alone. Others look at whole matrices (Muon, Adafactor) or
at all at once (LBFGS)."""
