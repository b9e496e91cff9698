"""Optimizers and learning-rate schedules for data-parallel training."""

from ringred.optim.scaling import LinearScaling
from ringred.optim.sharded import ShardedOptimizer

__all__ = ["LinearScaling", "ShardedOptimizer"]
