"""Uneven inputs (`join`): which ranks still have inputs, and what the ranks without inputs must take part in."""

from __future__ import annotations

import torch
from torch import nn

from ringred.communicator import Communicator
from ringred.data_parallel.layout import Layout
from ringred.data_parallel.sync_batchnorm import SyncBatchNorm

__all__ = ["Turn", "UnevenInputs", "check_joinable"]


def check_joinable(module: nn.Module, layout: Layout, throws: bool) -> None:
    """Raises `RuntimeError` for what a rank without inputs cannot take part in."""
    if not layout.joins or layout.settings.skip_unused:
        raise RuntimeError(
            "join() does not go with a ShardedOptimizer or LocalSGD, in whose steps all ranks take part, nor with "
            "skip_all_reduce_unused_params, for a rank without inputs does not know what is used"
        )
    layers = (SyncBatchNorm, nn.SyncBatchNorm)
    if not throws and any(isinstance(part, layers) for part in module.modules()):
        raise RuntimeError(
            "join() does not go with SyncBatchNorm, in whose forward all ranks take part, but for "
            "throw_on_early_termination=True"
        )


class Turn:
    """One forward of the ranks that still have inputs: `active` are these ranks, and `root` is the one whose
    buffers are copied to the others. `syncs` is whether its backward is reduced, `copies` whether buffers are copied
    before it."""

    def __init__(self, active: list[int], syncs: bool, copies: bool) -> None:
        self.active, self.syncs, self.copies = active, syncs, copies
        self.root = max(active, default=-1)


class UnevenInputs:
    """Finds out, at every forward, which ranks of `comm` still have inputs.

    A rank without inputs calls `next(None)` until nobody is active. With `throws`, all ranks raise `RuntimeError` as
    soon as one has no inputs left and another has.
    """

    def __init__(self, comm: Communicator, divides_by_all: bool, throws: bool) -> None:
        self.comm, self.divides_by_all, self.throws = comm, divides_by_all, throws
        self.last_root = 0

    def next(self, doing: tuple[bool, bool] | None) -> Turn:
        """The next forward of active ranks. `doing` is this rank's (syncs, copies), None without inputs. Collective."""
        size = self.comm.size
        table = torch.zeros(size + 2, dtype=torch.int64)
        if doing is not None:
            table[self.comm.rank] = 1
            table[size], table[size + 1] = doing
        self.comm.all_reduce(table, "max")
        active = table[:size].nonzero().view(-1).tolist()
        if self.throws and 0 < len(active) < size:
            done = sorted(set(range(size)) - set(active))
            raise RuntimeError(
                f"rank {self.comm.rank}: detected at least one rank that exhausted inputs "
                f"({', '.join(map(str, done))}). Throwing across all ranks."
            )
        turn = Turn(active, bool(table[size]), bool(table[size + 1]))
        if active:
            self.last_root = turn.root
        return turn
