"""The same model on every rank: checked, and copied from rank 0."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ringred.communicator import Communicator
from ringred.errors import ModelMismatch

__all__ = ["broadcast_tensors", "check_same_model"]

_COALESCED_BYTES = 250 << 20  # copied in parts of this size, as torch does


def _describe(module: nn.Module, ignored: set[str]) -> list[str]:
    named: list[tuple[str, str, Tensor]] = [("parameter", *item) for item in module.named_parameters()]
    named += [("buffer", *item) for item in module.named_buffers()]
    return [
        f"{kind} {name!r}: {list(t.shape)}, strides {list(t.stride())}, {t.dtype}"
        f"{'' if t.requires_grad else ', requires no gradient'}"
        for kind, name, t in named
        if name not in ignored
    ]


def check_same_model(comm: Communicator, module: nn.Module, ignored: set[str]) -> None:
    """Raises `ModelMismatch` on every rank if one of them built another model than rank 0."""
    text = "\n".join(_describe(module, ignored)).encode()
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
    comm.barrier()  # nobody may raise, and end, while others still read
    differing = next(rank for rank in range(comm.size) if models[rank] != models[0])
    mine, theirs = models[0], models[differing]
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    there = [model[at] if at < len(model) else "nothing more" for model in (mine, theirs)]
    raise ModelMismatch(
        f"rank {comm.rank}: DistributedDataParallel expects the same model on all ranks; "
        f"rank 0 has {there[0]}; rank {differing} has {there[1]}"
    )


def broadcast_tensors(comm: Communicator, tensors: Sequence[Tensor]) -> None:
    """Copies rank 0's tensors to all ranks, those of one dtype together."""
    if comm.size == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        # .data, as torch does it: writing to it does not spoil what autograd has saved for a backward to come.
        groups.setdefault(tensor.dtype, []).append(tensor.data)
    for together in groups.values():
        for part in _parts(together, _COALESCED_BYTES):
            flat = torch.cat([tensor.reshape(-1) for tensor in part])
            comm.broadcast(flat, 0)
            if comm.rank != 0:
                pieces = flat.split([tensor.numel() for tensor in part])
                views = [piece.view(t.shape) for piece, t in zip(pieces, part, strict=True)]
                torch._foreach_copy_(part, views)


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
