"""Optimizers and learning-rate schedules for data-parallel training."""

from ringred.optim.sharded import LinearScaling, ShardedOptimizer

__all__ = ["LinearScaling", "ShardedOptimizer"]
