"""A small model, its batches, and its gradients under a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred
from ringred import hooks
from ringred.communicator import Communicator
from ringred.testing import run_ranks

SMALL = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 30), nn.Tanh(), nn.Linear(30, 4))


def small() -> nn.Module:
    return copy.deepcopy(SMALL)  # ranks are threads, and share the random numbers


def batch(comm: Communicator, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * comm.rank + step)
    return torch.randn(16, 40, generator=generator), torch.randint(4, (16,), generator=generator)


def gradients_by(
    comm: Communicator, policy: Callable[[Communicator], hooks.Policy] | None, steps: int = 1, **options: Any
) -> list[list[Tensor]]:
    """The gradients of each of `steps` backwards of the same inputs, with parameters that stay as they are."""
    model = ringred.DistributedDataParallel(small(), process_group=comm, bucket_cap_mb=0.005, **options)
    if policy is not None:
        model.register_comm_hook(policy(comm), hooks.comm_hook)
    found = []
    for _ in range(steps):
        model.zero_grad()
        inputs, targets = batch(comm, 0)
        F.cross_entropy(model(inputs), targets).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return found


POLICIES: dict[str, Callable[[Communicator], hooks.Policy]] = {
    "fp16": hooks.Half,
    "bf16": lambda comm: hooks.Half(comm, torch.bfloat16),
    "int8": lambda comm: hooks.Int8(comm, block=64),
    "top_k": lambda comm: hooks.TopK(comm, 0.05),
    "power_sgd": lambda comm: hooks.PowerSGD(comm, rank=2),
}


# How near one gradient comes to the mean, and the mean of many to it, relative to its norm.
NEAR = {"fp16": (1e-3, 1e-3), "bf16": (1e-2, 1e-2), "int8": (0.02, 1e-3), "top_k": (1.0, 0.15), "power_sgd": (0.9, 0.1)}


def bytes_of(name: str | None, size: int, model: Callable[[], nn.Module], inputs: Callable[[int], Tensor]) -> int:
    """Bytes that a rank sends for one backward."""

    def body(comm: Communicator) -> int:
        wrapped = ringred.DistributedDataParallel(model(), process_group=comm, bucket_cap_mb=1, algorithm="direct")
        policy = None
        if name is not None:
            policy = POLICIES[name](comm)
            wrapped.register_comm_hook(policy, hooks.comm_hook)
        counters = comm.counters if policy is None else policy.counters
        wrapped(inputs(comm.rank)).sum().backward()  # buckets are laid out anew after the first
        wrapped.zero_grad()
        outputs = wrapped(inputs(comm.rank))
        before = counters.bytes_sent
        outputs.sum().backward()
        return counters.bytes_sent - before

    return run_ranks(body, size)[0]
