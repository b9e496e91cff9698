"""The reduce operations of torch, and the sum of sparse tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as _distributed
from torch import Tensor

from ringred.communicator import Communicator
from ringred.errors import UnsupportedTensor
from ringred.runtime.folds import ReduceOp

dist: Any = _distributed  # torch declares no types for most of what is used here

__all__ = ["operation", "sparse_all_reduce"]

_TYPES = dist.ReduceOp.RedOpType
_KINDS = {
    _TYPES.SUM: ReduceOp.SUM,
    _TYPES.AVG: ReduceOp.AVG,
    _TYPES.PREMUL_SUM: ReduceOp.SUM,
    _TYPES.PRODUCT: ReduceOp.PROD,
    _TYPES.MIN: ReduceOp.MIN,
    _TYPES.MAX: ReduceOp.MAX,
    _TYPES.BAND: ReduceOp.BAND,
    _TYPES.BOR: ReduceOp.BOR,
    _TYPES.BXOR: ReduceOp.BXOR,
}


def operation(opts: Any) -> tuple[ReduceOp, float | None]:
    """The operation, and the factor that each rank's input is multiplied by first (`premul_sum`), or None."""
    if opts is None:
        return ReduceOp.SUM, None
    given = getattr(opts, "reduceOp", opts)
    kind, factor = given.__getstate__() if isinstance(given, dist.ReduceOp) else (given, None)
    if kind not in _KINDS:
        raise UnsupportedTensor(f"unknown reduce operation {given!r}; there are {', '.join(map(str, _KINDS))}")
    return _KINDS[kind], factor


def sparse_all_reduce(comm: Communicator, tensor: Tensor, kind: ReduceOp, factor: float | None) -> None:
    """Sums sparse tensors: gathers the entries of all ranks and adds those with the same index."""
    where = f"rank {comm.rank}: all_reduce"
    if kind is not ReduceOp.SUM or factor is not None:
        raise UnsupportedTensor(f"{where}: sparse tensors can only be summed, got {kind.value}")
    mine = tensor.coalesce()
    shape = torch.tensor([mine.sparse_dim(), *mine.shape, mine._nnz()])
    shapes = [torch.empty_like(shape) for _ in range(comm.size)]
    comm.all_gather(shapes, shape)
    if any(not torch.equal(other[:-1], shape[:-1]) for other in shapes):
        raise ValueError(f"{where}: sparse tensors of unlike shapes, by rank: {[s[1:-1].tolist() for s in shapes]}")
    counts = [int(other[-1]) for other in shapes]
    indices = [mine.indices().new_empty(mine.sparse_dim() * count) for count in counts]
    values = [mine.values().new_empty(count, *mine.values().shape[1:]) for count in counts]
    comm.all_gather(indices, mine.indices().reshape(-1))
    comm.all_gather(values, mine.values())
    places = torch.cat([place.view(mine.sparse_dim(), -1) for place in indices], dim=1)
    tensor.copy_(torch.sparse_coo_tensor(places, torch.cat(values), mine.shape).coalesce())
