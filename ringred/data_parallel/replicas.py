"""Keeps the model the same on every rank: checks it at the start, copies it from one rank, checks it in training."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ringred.communicator import Communicator
from ringred.errors import ModelMismatch, PeerFailed, ReplicasDiverged
from ringred.runtime.folds import SUPPORTED, ReduceOp
from ringred.runtime.tensors import carried

__all__ = ["agreed_plan", "average_tensors", "broadcast_tensors", "check_same_model", "check_same_values"]

_COALESCED_BYTES = 250 << 20  # copied in parts of this size, as torch does
_LANES = 1024  # checksums add words along rows of this length and across them, and weight the sums by position


def _describe(module: nn.Module, ignored: set[str]) -> list[str]:
    named: list[tuple[str, str, Tensor]] = [("parameter", *item) for item in module.named_parameters()]
    named += [("buffer", *item) for item in module.named_buffers()]
    return [
        f"{kind} {name!r}: {list(t.shape)}, strides {list(t.stride())}, {t.dtype}, on {t.device.type}"
        f"{'' if t.requires_grad else ', requires no gradient'}"
        for kind, name, t in named
        if name not in ignored
    ]


def check_same_model(comm: Communicator, module: nn.Module, ignored: set[str], settings: Sequence[str] = ()) -> None:
    """Raises `ModelMismatch` on every rank if one of them built another model than rank 0, or asks for other
    `settings`, which are given as text."""
    text = "\n".join([*_describe(module, ignored), *settings]).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
    table = torch.empty(2 * comm.size, dtype=torch.int64)
    comm.all_gather(table, torch.tensor([digest, len(text)], dtype=torch.int64))
    rows = table.view(comm.size, 2).tolist()
    if all(row == rows[0] for row in rows):
        return
    # Only now, when they differ, do the descriptions travel.
    outputs = [torch.empty(length, dtype=torch.uint8) for _, length in rows]
    comm.all_gather(outputs, torch.tensor(list(text), dtype=torch.uint8))
    models = [bytes(output.tolist()).decode().split("\n") for output in outputs]
    _all_have_read(comm)
    differing = next(rank for rank in range(comm.size) if models[rank] != models[0])
    mine, theirs = models[0], models[differing]
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    there = [model[at] if at < len(model) else "nothing more" for model in (mine, theirs)]
    raise ModelMismatch(
        f"rank {comm.rank}: DistributedDataParallel expects the same model on all ranks; "
        f"rank 0 has {there[0]}; rank {differing} has {there[1]}"
    )


def check_same_values(comm: Communicator, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raises `ReplicasDiverged` on every rank if `tensors` differ between ranks in a single bit, naming the first one
    that does and the ranks. Collective."""
    table = torch.empty(comm.size * 2 * len(tensors), dtype=torch.int64)
    comm.all_gather(table, torch.stack([_checksum(tensor).cpu() for tensor in tensors]).view(-1))
    rows = table.view(comm.size, len(tensors), 2)
    differs = (rows != rows[0]).flatten(2).any(2).any(0)
    if not differs.any():
        return
    _all_have_read(comm)
    at = int(differs.nonzero()[0])
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(comm.size):
        groups.setdefault(tuple(rows[rank, at].tolist()), []).append(rank)
    most, *others = sorted(groups.values(), key=len, reverse=True)
    away = sorted(rank for group in others for rank in group)
    raise ReplicasDiverged(
        f"rank {comm.rank}: expected the same parameters on all ranks; {names[at]!r} is the first of "
        f"{int(differs.sum())} that differ: {_ranks(away)} from {_ranks(most)}. Something changes them besides the "
        "optimizer, or the optimizers differ"
    )


def _all_have_read(comm: Communicator) -> None:
    """Waits until all ranks hold what was gathered: none may raise while others are on the way to it. A rank that was
    quicker may raise while this one still waits; by then all hold it."""
    with contextlib.suppress(PeerFailed):
        comm.barrier()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _checksum(tensor: Tensor) -> Tensor:
    """Two int64 of a tensor's bits."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.data_ptr() % 4 == 0 else flat
    whole = words.numel() // _LANES * _LANES
    rows = words[:whole].view(-1, _LANES)
    lanes = rows.sum(0, dtype=torch.int64)
    lanes[: words.numel() - whole] += words[whole:]
    return torch.stack([_weighted(lanes), _weighted(rows.sum(1, dtype=torch.int64))])


def _weighted(sums: Tensor) -> Tensor:
    return (sums * torch.arange(1, sums.numel() + 1, device=sums.device)).sum()


def broadcast_tensors(comm: Communicator, tensors: Sequence[Tensor], src: int = 0, whole: bool = False) -> None:
    """Copies the tensors of rank `src` to all ranks, those of one dtype and device together. If it is to be `whole`, a
    rank has all of them or none, whatever fails; that takes as much memory again."""
    taken = []
    for part, flat in _coalesced(comm, tensors):
        comm.broadcast(flat, src)
        if comm.rank == src:
            continue
        if whole:
            taken.append((part, flat))
        else:
            _write_back(part, flat)
    if whole:
        comm.synchronize()  # on a device they were only enqueued
    for part, flat in taken:
        _write_back(part, flat)


def average_tensors(comm: Communicator, tensors: Sequence[Tensor]) -> None:
    """Replaces the tensors by their mean over all ranks; those of one dtype and device are reduced together."""
    for part, flat in _coalesced(comm, tensors):
        comm.all_reduce(flat, ReduceOp.AVG)
        _write_back(part, flat)


def agreed_plan(comm: Communicator, plan: Sequence[Sequence[int]], fixed: bool) -> tuple[list[list[int]], bool]:
    """The plan of rank 0, and whether it is `fixed` there; all ranks have as many parameters. Collective."""
    lengths = [len(bucket) for bucket in plan]
    head = torch.tensor([len(plan), fixed], dtype=torch.int64)
    comm.broadcast(head, 0)
    buckets, is_fixed = head.tolist()
    table = torch.zeros(buckets + sum(lengths), dtype=torch.int64)
    if comm.rank == 0:
        table.copy_(torch.tensor([*lengths, *(at for bucket in plan for at in bucket)]))
    comm.broadcast(table, 0)
    places = iter(table[buckets:].tolist())
    agreed = [[next(places) for _ in range(length)] for length in table[:buckets].tolist()]
    return agreed, bool(is_fixed)


def _coalesced(comm: Communicator, tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yields tensors of one dtype and device with a flat copy of them; yields nothing if there is only one rank."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors if comm.size > 1 else ():
        # `.data`, as in torch: writing to it does not invalidate tensors that autograd has saved for a backward.
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.data)
    for together in groups.values():
        for part in _parts(together, _COALESCED_BYTES):
            yield part, torch.cat([tensor.reshape(-1) for tensor in part])


def _write_back(part: list[Tensor], flat: Tensor) -> None:
    pieces = flat.split([tensor.numel() for tensor in part])
    views = [piece.view(t.shape) for piece, t in zip(pieces, part, strict=True)]
    if flat.dtype in SUPPORTED:
        torch._foreach_copy_(part, views)
    else:  # kernels are missing for many of the dtypes that are only moved
        for tensor, view in zip(part, views, strict=True):
            carried(tensor).copy_(carried(view))


def _parts(tensors: Sequence[Tensor], cap_bytes: int) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        part.append(tensor)
        filled += tensor.numel() * tensor.element_size()
        if filled >= cap_bytes:
            yield part
            part, filled = [], 0
    if part:
        yield part
