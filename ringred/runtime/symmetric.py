"""Collectives in which every rank does the same: from the user's arguments to their prepared form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringred.errors import UnsupportedTensor
from ringred.runtime import tensors
from ringred.runtime.calls import Prepared
from ringred.runtime.folds import ReduceOp, reduce_op
from ringred.runtime.planner import Planner, adjacent

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_in_place",
    "all_to_all",
    "barrier",
    "reduce_scatter",
]


def all_reduce(planner: Planner, tensor: Tensor, op: object, algorithm: str, grid: Sequence[int] | None) -> Prepared:
    """The all-reduce of any tensor."""
    where = planner.where("all_reduce")
    kind = reduce_op(op, where)
    flat = tensors.flat(where, tensor, kind)
    call = planner.call("all_reduce", flat, flat.memory.numel(), kind, algorithm=algorithm, grid=grid)
    return planner.whole(call, flat.memory, kind, back=flat.back)


def all_reduce_in_place(
    planner: Planner, tensor: Tensor, op: object, algorithm: str, grid: Sequence[int] | None
) -> Prepared:
    """The all-reduce of a contiguous tensor, to be played many times."""
    prepared = all_reduce(planner, tensor, op, algorithm, grid)
    if prepared.back:
        raise UnsupportedTensor("all_reduce_init: expected a contiguous tensor, whose memory stays in place")
    return prepared


def all_reduce_for(planner: Planner, purpose: str, tensor: Tensor, op: object) -> Prepared:
    """The all-reduce of any tensor, which only meets those for the same `purpose`."""
    prepared = all_reduce(planner, tensor, op, "auto", None)
    return prepared._replace(call=prepared.call.for_purpose(purpose))


def reduce_scatter(
    planner: Planner,
    output: Tensor,
    input: Tensor | Sequence[Tensor],
    op: object,
    algorithm: str,
    grid: Sequence[int] | None,
) -> Prepared:
    where, rank = planner.where("reduce_scatter"), planner.rank
    kind = reduce_op(op, where)
    shares = tensors.shares(where, input, planner.size, kind)
    flat = tensors.flat(where, output, kind, fill=False)
    bounds = adjacent([share.numel() for share in shares.parts])
    lo, hi = bounds[rank]
    tensors.expect(where, "output", (flat.memory.numel(), flat.dtype), hi - lo, shares.dtype)
    call = planner.call("reduce_scatter", flat, bounds[-1][1], kind, algorithm=algorithm, grid=grid, bounds=bounds)
    own = shares.parts[rank]
    if tensors.is_apart(flat.memory, shares.parts, rank) and planner.leaves_others(call, kind, flat.dtype):
        pieces = [*shares.parts[:rank], flat.memory, *shares.parts[rank + 1 :]]
        return planner.in_pieces(call, pieces, kind, tensors.copies(where, flat.memory, own), flat.back)
    work = flat.memory.new_empty(bounds[-1][1])
    fill = tuple((work[lo:hi], share) for (lo, hi), share in zip(bounds, shares.parts, strict=True))
    return planner.reduced_shares(call, work, bounds, kind, fill=fill, back=((flat.memory, work[lo:hi]), *flat.back))


def all_gather(
    planner: Planner, output: Tensor | Sequence[Tensor], tensor: Tensor, algorithm: str, grid: Sequence[int] | None
) -> Prepared:
    where, rank = planner.where("all_gather"), planner.rank
    shares = tensors.outputs(where, output, planner.size)
    flat = tensors.flat(where, tensor, None, written=False)
    own = shares.parts[rank]
    tensors.expect(where, f"share {rank} of output", (own.numel(), shares.dtype), flat.memory.numel(), flat.dtype)
    bounds = adjacent([share.numel() for share in shares.parts])
    call = planner.call("all_gather", flat, bounds[-1][1], None, algorithm=algorithm, grid=grid, bounds=bounds)
    return planner.in_pieces(call, shares.parts, None, tensors.copies(where, own, flat.memory), shares.back)


def all_to_all(planner: Planner, output: Tensor | Sequence[Tensor], input: Tensor | Sequence[Tensor]) -> Prepared:
    where, own, size = planner.where("all_to_all"), planner.rank, planner.size
    outgoing = tensors.shares(where, input, size, None)
    incoming = tensors.outputs(where, output, size)
    got, expected = incoming.parts[own], outgoing.parts[own]
    tensors.expect(where, f"share {own} of output", (got.numel(), incoming.dtype), expected.numel(), outgoing.dtype)
    call = planner.call("all_to_all", tensors.Flat(got, (), incoming.dtype), None, None)
    units = [got.new_empty(0)] * size**2
    for peer in range(size):
        units[peer * size + own] = incoming.parts[peer]
        units[own * size + peer] = outgoing.parts[peer]
    return planner.by_units(call, units, fill=tensors.copies(where, got, expected), back=incoming.back)


def barrier(planner: Planner) -> Prepared:
    token = tensors.Flat(torch.zeros(1, dtype=torch.uint8, device=planner.device), (), torch.uint8)
    call = planner.call("barrier", token, 1, ReduceOp.MAX)
    return planner.whole(call, token.memory, ReduceOp.MAX)
