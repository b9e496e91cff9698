"""Turns the tensors that users pass into flat memory: decides what is refused, what is copied and written back.

`where` is the rank and the collective; every error message begins with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringred.errors import UnsupportedTensor
from ringred.runtime.calls import Copies
from ringred.runtime.folds import SUPPORTED, ReduceOp, check_dtype
from ringred.runtime.select import share_bounds
from ringred.transports.cuda import joining

__all__ = [
    "Flat",
    "Shares",
    "borrowed",
    "carried",
    "copies",
    "expect",
    "flat",
    "holding",
    "identity",
    "is_apart",
    "is_plain",
    "outputs",
    "over_host_memory",
    "shares",
]

# A tensor that is only moved, and whose dtype has no kernels, is moved as integers of the same width.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Flat(NamedTuple):
    """A user's tensor as 1-D contiguous `memory`. `back` brings a result to the tensor where `memory` is a copy of it.
    `dtype` is the user's; that of `memory` may be an integer of the same width."""

    memory: Tensor
    back: Copies
    dtype: torch.dtype


class Shares(NamedTuple):
    """As `Flat`, with one memory a rank."""

    parts: list[Tensor]
    back: Copies
    dtype: torch.dtype


def carried(tensor: Tensor) -> Tensor:
    """A view of the memory of `tensor` as integers of the same width."""
    return tensor.view(_CARRIERS[tensor.element_size()])


def is_plain(tensor: Tensor, device: torch.device | None = None) -> bool:
    """Whether `tensor` is plain contiguous memory of `device`, or of the CPU, so that address, length and dtype
    describe it fully."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and (tensor.is_cpu if device is None else tensor.device == device)
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def flat(where: str, tensor: Tensor, op: ReduceOp | None, *, fill: bool = True, written: bool = True) -> Flat:
    """`tensor` as flat memory.

    `op` is what it will be combined by; None if it is only moved, which every dtype can be. `fill` says that its values
    count, `written` that it will be written to. Raises `UnsupportedTensor`.
    """
    if not isinstance(tensor, Tensor):
        raise UnsupportedTensor(f"{where}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise UnsupportedTensor(f"{where}: expected a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.device.type != "cpu" and tensor.device.type not in joining.DRIVERS:
        raise UnsupportedTensor(f"{where}: expected a tensor of the CPU or of CUDA, got one on {tensor.device}")
    if tensor.numel() and (tensor._is_zerotensor() or not tensor.data_ptr()):
        raise UnsupportedTensor(f"{where}: expected a tensor with memory, got one without")
    if tensor.is_quantized:
        raise UnsupportedTensor(f"{where}: expected a tensor of plain numbers, got a quantized one of {tensor.dtype}")
    if op is not None:
        check_dtype(where, tensor.dtype, op)
    if written and any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)):
        raise UnsupportedTensor(f"{where}: expected memory of its own for each element, got an expanded tensor")
    detached = tensor.detach()
    if tensor.dtype not in SUPPORTED and not detached.is_conj():
        detached = carried(detached)
    if detached.is_contiguous() and not detached.is_conj() and not detached.is_neg():
        # Not view(-1), because that keeps an unusual stride if there is at most one element.
        return Flat(detached.as_strided((detached.numel(),), (1,)), (), tensor.dtype)
    copy = torch.empty_like(detached, memory_format=torch.contiguous_format)
    if fill:
        copy.copy_(detached)
    memory = copy.view(-1)
    if memory.dtype not in SUPPORTED:
        memory = carried(memory)
    return Flat(memory, ((detached, copy),), tensor.dtype)


def shares(where: str, tensors: Tensor | Sequence[Tensor], size: int, op: ReduceOp | None) -> Shares:
    """The flat tensors to read from, one for each rank: equal shares of one tensor, or the tensors of a list."""
    if isinstance(tensors, Tensor):
        _expect_equal_shares(where, tensors, size)
        whole = flat(where, tensors, op, written=False)
        return Shares(_cut(whole.memory, size), (), whole.dtype)
    _expect_list(where, tensors, size)
    each = [flat(where, tensor, op, written=False) for tensor in tensors]
    return Shares([one.memory for one in each], (), each[0].dtype)


def outputs(where: str, tensors: Tensor | Sequence[Tensor], size: int) -> Shares:
    """The flat tensors to write to, one a rank."""
    if isinstance(tensors, Tensor):
        _expect_equal_shares(where, tensors, size)
        whole = flat(where, tensors, None, fill=False)
        return Shares(_cut(whole.memory, size), whole.back, whole.dtype)
    _expect_list(where, tensors, size)
    each = [flat(where, tensor, None, fill=False) for tensor in tensors]
    return Shares([one.memory for one in each], sum((one.back for one in each), ()), each[0].dtype)


def _cut(whole: Tensor, size: int) -> list[Tensor]:
    return [whole[lo:hi] for lo, hi in share_bounds(whole.numel(), size)]


def copies(where: str, target: Tensor, source: Tensor) -> Copies:
    """The copy from `source` to `target`, if the two are not the same memory. Raises `ValueError` if they overlap."""
    start, other = target.data_ptr(), source.data_ptr()
    if start == other:
        return ()
    if start < other + source.nbytes and other < start + target.nbytes:
        raise ValueError(f"{where}: expected an output apart from its input, or the same memory, got a part of it")
    return ((target, source),)


def is_apart(output: Tensor, shares: Sequence[Tensor], own: int) -> bool:
    """Whether `output` overlaps none of `shares`, except that it may be the memory of the share `own`."""
    lo, hi = output.data_ptr(), output.data_ptr() + output.nbytes
    for at, share in enumerate(shares):
        start, end = share.data_ptr(), share.data_ptr() + share.nbytes
        if start < hi and lo < end and not (at == own and start == lo):
            return False
    return True


def identity(prepare: object, arguments: Sequence[Any], device: torch.device | None = None) -> tuple[Any, ...] | None:
    """All that a call of `prepare` on `arguments` depends on, where every tensor is plain, on `device` or the CPU, and
    of a dtype that can be reduced; else None."""
    key = [prepare]
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            key.append(len(argument))
            each = argument
        else:
            each = (argument,)
        for one in each:
            if not isinstance(one, Tensor):
                key.append(one)
            elif is_plain(one, device) and one.dtype in SUPPORTED and (one.data_ptr() or not one.numel()):
                key += (one.data_ptr(), one.numel(), one.dtype)
            else:
                return None
    return tuple(key)


def holding(arguments: Any) -> list[Tensor]:
    """Tensors that keep the memory of those in `arguments`, whatever becomes of a list of them, or of their `data`."""
    if isinstance(arguments, Tensor):
        return [arguments.detach()]
    if isinstance(arguments, (list, tuple)):
        return [tensor for one in arguments for tensor in holding(one)]
    return []


def borrowed(arguments: Sequence[Any], over: Callable[[int, int, torch.dtype], Tensor]) -> list[Any]:
    """`arguments` with plain tensors that do not keep their memory alive; the caller must know that it stays. They are
    made by `over(address, nbytes, dtype)`."""
    return [
        _unowned(one, over)
        if isinstance(one, Tensor)
        else [_unowned(each, over) if isinstance(each, Tensor) else each for each in one]
        if isinstance(one, (list, tuple))
        else one
        for one in arguments
    ]


def _unowned(tensor: Tensor, over: Callable[[int, int, torch.dtype], Tensor]) -> Tensor:
    there = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    if there < tensor.nbytes:
        raise UnsupportedTensor(f"expected {tensor.nbytes} bytes of memory, got a tensor whose storage has {there}")
    return over(tensor.data_ptr(), tensor.nbytes, tensor.dtype)


def over_host_memory(address: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """A 1-D tensor over memory that it does not keep."""
    if not nbytes:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype)


def expect(where: str, what: str, got: tuple[int, torch.dtype], elements: int, dtype: torch.dtype) -> None:
    """Raises `ValueError` unless `what` has `elements` elements of `dtype`; `got` is how many it has, and of which."""
    if got != (elements, dtype):
        raise ValueError(f"{where}: {what} expected {elements} elements of {dtype}, got {got[0]} of {got[1]}")


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
