"""The linear-scaling rule for the learning rate of large batches, with gradual warm-up and momentum correction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ringred.optim.sharded import ShardedOptimizer

__all__ = ["LinearScaling"]


class LinearScaling(torch.optim.lr_scheduler.LRScheduler):
    """The linear-scaling rule with gradual warm-up, stepped once an iteration.

    The optimizer's learning rate is the one for a batch of `reference` samples over all ranks. For a batch of `batch`
    samples the rate becomes rate × batch / reference. It grows to that value from the optimizer's rate in equal steps
    over the first `warm_up` iterations; after them it is multiplied by `then(iteration)`, 1 by default.

    torch's optimizers multiply by the rate when they apply the momentum, and a changing rate needs no correction. For
    an optimizer whose momentum includes the rate, `momentum` is the name of that state, which is multiplied by new
    rate / old rate at each change (momentum correction).

    Goyal et al., Accurate, large minibatch SGD: training ImageNet in 1 hour (2017), sections 2.1, 2.2 and 3.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        batch: int,
        reference: int = 256,
        warm_up: int,
        then: Callable[[int], float] | None = None,
        momentum: str | None = None,
    ) -> None:
        if batch < 1 or reference < 1 or warm_up < 0:
            raise ValueError(
                f"LinearScaling: expected batch ≥ 1, reference ≥ 1, warm_up ≥ 0, got {batch}, {reference}, {warm_up}"
            )
        self.scale, self.warm_up, self.then, self.momentum = batch / reference, warm_up, then, momentum
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the groups in this iteration."""
        at = self.last_epoch
        factor = self.scale
        if at < self.warm_up:
            factor = 1 + (self.scale - 1) * at / self.warm_up
        elif self.then is not None:
            factor *= self.then(at)
        return [float(base) * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state without `then`, which is code and must be given to the constructor again."""
        return {name: value for name, value in super().state_dict().items() if name != "then"}

    def step(self, epoch: int | None = None) -> None:
        """The next iteration's rates."""
        before = [float(group["lr"]) for group in self.optimizer.param_groups]
        super().step(epoch)
        if self.momentum is None:
            return
        for number, (old, group) in enumerate(zip(before, self.optimizer.param_groups, strict=True)):
            if isinstance(self.optimizer, ShardedOptimizer):
                states = self.optimizer.kept(number)
            else:
                states = [self.optimizer.state.get(parameter, {}) for parameter in group["params"]]
            for state in states:
                held = state.get(self.momentum)
                if held is not None and old:
                    held.mul_(float(group["lr"]) / old)
