"""Collectives with a root, and messages between two ranks: from the user's arguments to their prepared form.

The root of a broadcast or a scatter may be done before the others have begun, and so may every rank but the root of a
reduce or a gather. `Prepared.one_way` says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringred.runtime import tensors
from ringred.runtime.calls import Post, Prepared
from ringred.runtime.folds import reduce_op
from ringred.runtime.planner import Planner

__all__ = ["broadcast", "gather", "recv", "reduce", "scatter", "send", "send_later"]


def broadcast(planner: Planner, tensor: Tensor, src: int, algorithm: str) -> Prepared:
    _check_peer(planner, "broadcast", "src", src)
    receives = planner.rank != src
    flat = tensors.flat(planner.where("broadcast"), tensor, None, written=receives)
    call = planner.call("broadcast", flat, flat.memory.numel(), None, algorithm=algorithm, root=src)
    return planner.whole(call, flat.memory, None, back=flat.back if receives else (), one_way=True)


def reduce(planner: Planner, tensor: Tensor, dst: int, op: object, algorithm: str) -> Prepared:
    _check_peer(planner, "reduce", "dst", dst)
    where, receives = planner.where("reduce"), planner.rank == dst
    kind = reduce_op(op, where)
    flat = tensors.flat(where, tensor, kind, written=receives)
    call = planner.call("reduce", flat, flat.memory.numel(), kind, algorithm=algorithm, root=dst)
    if receives:
        return planner.whole(call, flat.memory, kind, back=flat.back)
    work = torch.empty_like(flat.memory)  # the user's tensor keeps its values
    return planner.whole(call, work, kind, fill=((work, flat.memory),), one_way=True)


def gather(planner: Planner, tensor: Tensor, output: Tensor | Sequence[Tensor] | None, dst: int) -> Prepared:
    _check_peer(planner, "gather", "dst", dst)
    where, rank, size = planner.where("gather"), planner.rank, planner.size
    flat = tensors.flat(where, tensor, None, written=False)
    call = planner.call("gather", flat, None, None, root=dst)
    if rank != dst:
        _expect_none(planner, "gather", "output", output, dst)
        units = [flat.memory.new_empty(0)] * size
        units[rank] = flat.memory
        return planner.by_units(call, units, one_way=True)
    if output is None:
        raise ValueError(f"gather: rank {rank} is dst and expected an output, got None")
    shares = tensors.outputs(where, output, size)
    own = shares.parts[dst]
    tensors.expect(where, f"share {rank} of output", (own.numel(), shares.dtype), flat.memory.numel(), flat.dtype)
    return planner.by_units(call, shares.parts, fill=tensors.copies(where, own, flat.memory), back=shares.back)


def scatter(planner: Planner, tensor: Tensor, input: Tensor | Sequence[Tensor] | None, src: int) -> Prepared:
    _check_peer(planner, "scatter", "src", src)
    where, rank, size = planner.where("scatter"), planner.rank, planner.size
    flat = tensors.flat(where, tensor, None, fill=False)
    call = planner.call("scatter", flat, None, None, root=src)
    if rank != src:
        _expect_none(planner, "scatter", "input", input, src)
        units = [flat.memory.new_empty(0)] * size
        units[rank] = flat.memory
        return planner.by_units(call, units, back=flat.back)
    if input is None:
        raise ValueError(f"scatter: rank {rank} is src and expected an input, got None")
    shares = tensors.shares(where, input, size, None)
    own = shares.parts[src]
    tensors.expect(where, f"share {rank} of input", (own.numel(), shares.dtype), flat.memory.numel(), flat.dtype)
    fill = tensors.copies(where, flat.memory, own)
    return planner.by_units(call, shares.parts, fill=fill, back=flat.back, one_way=True)


def send(planner: Planner, tensor: Tensor, dst: int) -> Prepared:
    _check_peer(planner, "send", "dst", dst, itself=False)
    flat = tensors.flat(planner.where("send"), tensor, None, written=False)
    return planner.pair(planner.pair_call(flat, planner.rank, dst), flat.memory, planner.rank, dst, ())


def send_later(planner: Planner, tensor: Tensor, dst: int) -> Prepared:
    """A send of what `tensor` holds now; it is done as soon as it has begun."""
    _check_peer(planner, "send", "dst", dst, itself=False)
    flat = tensors.flat(planner.where("send"), tensor, None, written=False)
    call = planner.pair_call(flat, planner.rank, dst)
    # In a window a message needs no slot, so that the receiver gets it whatever this rank does meanwhile.
    copied = planner.empty(flat.memory.numel(), flat.memory.dtype).copy_(flat.memory)
    parts = copied.split(planner.segment_elements(flat.memory))
    return Prepared(call, Post(dst, parts), pair=(planner.rank, dst))


def recv(planner: Planner, tensor: Tensor, src: int) -> Prepared:
    _check_peer(planner, "recv", "src", src, itself=False)
    flat = tensors.flat(planner.where("recv"), tensor, None, fill=False)
    return planner.pair(planner.pair_call(flat, src, planner.rank), flat.memory, src, planner.rank, flat.back)


def _check_peer(planner: Planner, collective: str, what: str, peer: int, itself: bool = True) -> None:
    if not 0 <= peer < planner.size:
        raise ValueError(f"{planner.where(collective)}: {what} {peer} is no rank of 0..{planner.size - 1}")
    if not itself and peer == planner.rank:
        raise ValueError(f"{planner.where(collective)}: to or from itself")


def _expect_none(planner: Planner, collective: str, what: str, given: object, root: int) -> None:
    if given is not None:
        raise ValueError(f"{planner.where(collective)}: {what} is for rank {root} only, expected None here")
