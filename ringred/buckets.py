"""Buckets of gradients: which parameters share one, where each lies in it, and when it is full."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FIRST_BUCKET_BYTES", "Bucket", "Entry", "assign"]

# torch's: a first bucket that is soon full starts the reduction early.
FIRST_BUCKET_BYTES = 1 << 20


class Entry(NamedTuple):
    """A parameter as bucket assignment sees it: bytes of its gradient, and what must be alike in a bucket."""

    nbytes: int
    key: Hashable


def assign(entries: Sequence[Entry], order: Sequence[int], cap_bytes: int, first_cap_bytes: int) -> list[list[int]]:
    """Fills buckets with the parameters `order` (indices of `entries`), one open bucket for each key.

    A bucket is closed once it holds ≥ its cap, which is `first_cap_bytes` for the first of each key, as in
    torch's DistributedDataParallel. Buckets come in the order in which their last parameter does: the order in
    which they will be full.
    """
    closed: list[list[int]] = []
    open_buckets: dict[Hashable, list[int]] = {}
    filled: dict[Hashable, int] = {}
    caps: dict[Hashable, int] = {}
    for index in order:
        entry = entries[index]
        bucket = open_buckets.setdefault(entry.key, [])
        bucket.append(index)
        filled[entry.key] = filled.get(entry.key, 0) + entry.nbytes
        if filled[entry.key] >= caps.get(entry.key, first_cap_bytes):
            closed.append(open_buckets.pop(entry.key))
            filled[entry.key] = 0
            caps[entry.key] = cap_bytes
    position = {index: at for at, index in enumerate(order)}
    return sorted([*closed, *open_buckets.values()], key=lambda bucket: position[bucket[-1]])


class Bucket:
    """One flat tensor with a view for the gradient of each of its parameters.

    `parameters` are indices into the model's list; `views[i]` has the shape and strides of the i-th one's
    gradient. `missing` counts the parameters whose gradients are not there yet. `empty(elements, dtype)` gives the
    memory.
    """

    def __init__(
        self, indices: Sequence[int], parameters: Sequence[Tensor], empty: Callable[[int, torch.dtype], Tensor]
    ) -> None:
        members = [parameters[index] for index in indices]
        elements = sum(member.numel() for member in members)
        self.indices = list(indices)
        self.flat = empty(elements, members[0].dtype).zero_()
        self.views: list[Tensor] = []
        offset = 0
        for member in members:
            part = self.flat[offset : offset + member.numel()]
            self.views.append(_view_like(part, member))
            offset += member.numel()
        self.missing = len(self.indices)

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def put(self, place: int, gradient: Tensor | None) -> None:
        """Copies the gradient of the `place`-th parameter in, unless it lies there already; None counts as zeros."""
        view = self.views[place]
        if gradient is None:
            view.zero_()
        elif gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient.detach())


def _view_like(part: Tensor, like: Tensor) -> Tensor:
    """`part` in the shape of `like`, with its strides where those fill a dense block (channels last, say)."""
    if like.is_contiguous() or not _is_dense(like):
        return part.view(like.shape)
    return part.as_strided(like.shape, like.stride(), part.storage_offset())


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent != 1:
            if stride != expected:
                return False
            expected *= extent
    return True
