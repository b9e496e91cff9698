"""A small classifier, wrapped, and its batches: what the tests of DistributedDataParallel share."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 4))


def wrapped(comm: Communicator, module: nn.Module = MODEL, **options: Any) -> ringred.DistributedDataParallel:
    return ringred.DistributedDataParallel(copy.deepcopy(module), process_group=comm, **options)


def batch(rank: int, count: int = 8, step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(count, 30, generator=generator), torch.randint(4, (count,), generator=generator)


def backward(model: nn.Module, *at: int) -> Tensor:
    inputs, targets = batch(*at)
    loss = F.cross_entropy(model(inputs), targets)
    loss.backward()
    return loss


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
