"""Buckets of gradients: which parameters share one, where each lies in it, and when it is full."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FIRST_BUCKET_BYTES", "MIB", "Bucket", "Entry", "SparseBucket", "assign"]

MIB = 1 << 20
# The value that torch uses: a small first bucket is full early, so that the reduction starts early.
FIRST_BUCKET_BYTES = MIB


class Entry(NamedTuple):
    """A parameter for bucket assignment: the bytes of its gradient, and a `key` that all of a bucket must share."""

    nbytes: int
    key: Hashable


def assign(entries: Sequence[Entry], order: Sequence[int], caps: Sequence[int]) -> list[list[int]]:
    """Assigns the parameters in `order` (indices into `entries`) to buckets; each key has one open bucket.

    A bucket is closed once it holds at least its cap in bytes. `caps[i]` is the cap of the i-th bucket of each key, and
    the last cap also applies to all later buckets, as in torch's DistributedDataParallel. Buckets are returned in the
    order of their last parameters, which is the order in which they will be full.
    """
    closed: list[list[int]] = []
    open_buckets: dict[Hashable, list[int]] = {}
    filled: dict[Hashable, int] = {}
    made: dict[Hashable, int] = {}
    for index in order:
        entry = entries[index]
        bucket = open_buckets.setdefault(entry.key, [])
        bucket.append(index)
        filled[entry.key] = filled.get(entry.key, 0) + entry.nbytes
        number = made.get(entry.key, 0)
        if filled[entry.key] >= caps[min(number, len(caps) - 1)]:
            closed.append(open_buckets.pop(entry.key))
            filled[entry.key] = 0
            made[entry.key] = number + 1
    position = {index: at for at, index in enumerate(order)}
    return sorted([*closed, *open_buckets.values()], key=lambda bucket: position[bucket[-1]])


class Bucket:
    """One flat tensor with a view for the gradient of each of its parameters.

    `parameters` are indices into the model's list; `views[i]` has the shape and strides of the gradient of
    the i-th parameter. `missing` counts the parameters whose gradients are not there yet. `empty(elements, dtype)`
    allocates the memory; `copy(view, gradient)` is how gradients are copied to their views.
    """

    def __init__(
        self,
        indices: Sequence[int],
        parameters: Sequence[Tensor],
        empty: Callable[[int, torch.dtype], Tensor],
        copy: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    ) -> None:
        self._copy = copy
        members = [parameters[index] for index in indices]
        elements = sum(member.numel() for member in members)
        self.indices = list(indices)
        self.flat = empty(elements, members[0].dtype).zero_()
        self._members, self.dtype = members, members[0].dtype
        self.views = self.views_in(self.flat)
        self.missing = len(self.indices)

    def views_in(self, flat: Tensor) -> list[Tensor]:
        """For each parameter a view, in its shape and strides, of `flat`, a tensor as long as this bucket's own."""
        parts = flat.split([member.numel() for member in self._members])
        return [_view_like(part, member) for part, member in zip(parts, self._members, strict=True)]

    @property
    def values(self) -> Tensor:
        """All gradients, flat."""
        return self.flat

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def put(self, place: int, gradient: Tensor | None, scale: float | None = None) -> None:
        """Copies the gradient of the `place`-th parameter into the bucket, unless it is already there.

        None counts as zeros. If `scale` is given, the gradient is multiplied by it.
        """
        view = self.views[place]
        if gradient is None:
            view.zero_()
        elif scale is not None:
            torch.mul(gradient.detach(), scale, out=view)
        elif gradient.data_ptr() != view.data_ptr():
            self._copy(view, gradient.detach())


class SparseBucket:
    """Holds one sparse (COO) gradient of one parameter, as `Bucket` holds the dense gradients of its parameters."""

    def __init__(self, index: int, parameter: Tensor) -> None:
        self.indices = [index]
        self._like, self.dtype = parameter, parameter.dtype
        self.missing = 1
        self.gradient: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the last gradient: its values and their indices."""
        if self.gradient is None:
            return 0
        return sum(part.numel() * part.element_size() for part in (self.gradient._values(), self.gradient._indices()))

    @property
    def values(self) -> Tensor:
        """The values of the gradient's rows."""
        assert self.gradient is not None, "a gradient was put"
        return self.gradient.values()

    @property
    def views(self) -> list[Tensor]:
        """A list that contains only `values`, because there is only one parameter."""
        return [self.values]

    def put(self, place: int, gradient: Tensor | None, scale: float | None = None) -> None:
        """Stores the gradient, coalesced and multiplied by `scale` if given; None counts as a gradient without rows."""
        if gradient is None:
            gradient = torch.sparse_coo_tensor(
                torch.empty((1, 0), dtype=torch.int64),
                self._like.new_empty((0, *self._like.shape[1:])),
                self._like.shape,
                check_invariants=False,
            )
        gradient = gradient.detach().coalesce()
        self.gradient = gradient if scale is None else gradient * scale


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
