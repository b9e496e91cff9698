"""Tensors as users give them, turned into flat memory: what is refused, what is copied, what is written back.

`where` begins every message: the rank and the collective.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ringred.errors import UnsupportedTensor
from ringred.runtime.folds import ReduceOp, check_dtype
from ringred.runtime.select import share_bounds

__all__ = ["WriteBack", "expect", "flat", "in_turn", "is_plain", "outputs", "shares", "unowned"]

WriteBack: TypeAlias = Callable[[], None] | None
"""What brings a result from the flat copy back to the user's tensor; None where there is no copy."""


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is nothing but dense memory of its own on the CPU, so that its address says all."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def flat(
    where: str, tensor: Tensor, op: ReduceOp | None, *, fill: bool = True, written: bool = True
) -> tuple[Tensor, WriteBack]:
    """`tensor` as 1-D contiguous memory, and what writes it back where that is a copy.

    `op` is what it will be combined by, if anything; `fill` says that its values count, `written` that it will be
    written to. Raises `UnsupportedTensor`.
    """
    if not isinstance(tensor, Tensor):
        raise UnsupportedTensor(f"{where}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise UnsupportedTensor(f"{where}: expected a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.device.type != "cpu":
        raise UnsupportedTensor(f"{where}: expected a CPU tensor, got one on {tensor.device}")
    check_dtype(where, tensor.dtype, op)
    if written and any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)):
        raise UnsupportedTensor(f"{where}: expected memory of its own for each element, got an expanded tensor")
    detached = tensor.detach()
    if detached.is_contiguous() and not detached.is_conj() and not detached.is_neg():
        # as_strided, for view(-1) keeps an odd stride where there is at most one element.
        return detached.as_strided((detached.numel(),), (1,)), None
    copy = torch.empty_like(detached, memory_format=torch.contiguous_format)
    if fill:
        copy.copy_(detached)
    return copy.view(-1), lambda: _write(detached, copy)


def _write(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def shares(where: str, tensors: Tensor | Sequence[Tensor], size: int, op: ReduceOp | None) -> list[Tensor]:
    """The flat tensors to read from, one a rank: of one tensor in equal shares, or of a list."""
    if isinstance(tensors, Tensor):
        _expect_equal_shares(where, tensors, size)
        whole, _ = flat(where, tensors, op, written=False)
        return [whole[lo:hi] for lo, hi in share_bounds(whole.numel(), size)]
    _expect_list(where, tensors, size)
    return [flat(where, tensor, op, written=False)[0] for tensor in tensors]


def outputs(where: str, tensors: Tensor | Sequence[Tensor], size: int) -> tuple[list[Tensor], WriteBack]:
    """The flat tensors to write to, one a rank, and what writes back those that are copies."""
    if isinstance(tensors, Tensor):
        _expect_equal_shares(where, tensors, size)
        whole, back = flat(where, tensors, None, fill=False)
        return [whole[lo:hi] for lo, hi in share_bounds(whole.numel(), size)], back
    _expect_list(where, tensors, size)
    pairs = [flat(where, tensor, None, fill=False) for tensor in tensors]
    return [part for part, _ in pairs], in_turn(*(back for _, back in pairs))


def is_apart(output: Tensor, shares: Sequence[Tensor], own: int) -> bool:
    """Whether writing to `output` changes none of `shares`, unless it is the share `own` itself and that alone."""
    lo, hi = output.data_ptr(), output.data_ptr() + output.nbytes
    for at, share in enumerate(shares):
        start, end = share.data_ptr(), share.data_ptr() + share.nbytes
        if start < hi and lo < end and not (at == own and start == lo):
            return False
    return True


def unowned(tensor: Tensor) -> Tensor:
    """The memory of the flat `tensor` as a tensor that does not hold it, for whoever knows that it is held."""
    if not tensor.numel():
        return torch.empty(0, dtype=tensor.dtype)
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype)


def expect(where: str, what: str, tensor: Tensor, elements: int, dtype: torch.dtype) -> None:
    """Raises `ValueError` unless `tensor`, which is called `what`, has so many elements of `dtype`."""
    if tensor.numel() != elements or tensor.dtype != dtype:
        raise ValueError(
            f"{where}: {what} expected {elements} elements of {dtype}, got {tensor.numel()} of {tensor.dtype}"
        )


def in_turn(*actions: WriteBack) -> WriteBack:
    """All of `actions` that there are, one after the other."""
    present = [action for action in actions if action is not None]
    if not present:
        return None

    def all_of_them() -> None:
        for action in present:
            action()

    return all_of_them


def _expect_equal_shares(where: str, tensor: Tensor, size: int) -> None:
    if tensor.numel() % size:
        raise ValueError(
            f"{where}: expected a multiple of {size} elements, got {tensor.numel()}; "
            "shares of different lengths are given as a list of tensors"
        )


def _expect_list(where: str, tensors: Sequence[Tensor], size: int) -> None:
    if len(tensors) != size:
        raise ValueError(f"{where}: expected {size} tensors, got {len(tensors)}")
    dtypes = {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}
    if len(dtypes) > 1:
        raise UnsupportedTensor(f"{where}: expected one dtype, got {dtypes}")
