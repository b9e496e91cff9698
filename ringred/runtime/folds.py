"""Reduce operations: which dtypes each one supports, and how operands are combined (folded).

Sums of float16 and bfloat16 are accumulated in float32 within one fold and rounded once; between the steps
of an algorithm (ring, tree) the partial sum is rounded and sent in the tensor's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from ringred.errors import UnsupportedTensor

__all__ = ["SUPPORTED", "Folder", "ReduceOp", "check_dtype", "reduce_op"]


class ReduceOp(str, Enum):
    """How values of several ranks become one. `avg` is the sum divided by the number of ranks."""

    SUM = "sum"
    AVG = "avg"
    PROD = "prod"
    MIN = "min"
    MAX = "max"
    __hash__ = str.__hash__  # Enum's own hash is slow, and each call looks up its operation in a dict

    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ARITHMETIC = frozenset({ReduceOp.SUM, ReduceOp.PROD})
_ORDER = frozenset({ReduceOp.MIN, ReduceOp.MAX})
_BITS = frozenset({ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR})

SUPPORTED: dict[torch.dtype, frozenset[ReduceOp]] = {
    **dict.fromkeys(_FLOATS, _ARITHMETIC | _ORDER | {ReduceOp.AVG}),
    **dict.fromkeys(_COMPLEX, _ARITHMETIC | {ReduceOp.AVG}),
    **dict.fromkeys(_INTEGERS, _ARITHMETIC | _ORDER | _BITS),
    torch.bool: _ARITHMETIC | _ORDER | _BITS,
}
"""The table of all supported dtypes and the operations that each one supports."""

_KERNELS: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.PROD: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}
# On bool, a sum is a logical "or" and a product a logical "and", as in torch's NCCL backend.
_BOOL_KERNELS = _KERNELS | {
    ReduceOp.SUM: torch.bitwise_or,
    ReduceOp.PROD: torch.bitwise_and,
    ReduceOp.MIN: torch.bitwise_and,
    ReduceOp.MAX: torch.bitwise_or,
}
_ROUNDED = frozenset({torch.float16, torch.bfloat16})


def reduce_op(op: object, where: str) -> ReduceOp:
    """Converts `op`, a `ReduceOp`, its name or an operation of torch.distributed, to a `ReduceOp`.

    Raises `ValueError` with a message that begins with `where`.
    """
    if isinstance(op, ReduceOp):
        return op
    # torch.distributed.ReduceOp.SUM prints as "RedOpType.SUM" or "<RedOpType.SUM: 0>", by version.
    name = op if isinstance(op, str) else str(op).strip("<>").split(":")[0].rpartition(".")[2]
    try:
        return ReduceOp(name.lower())
    except ValueError:
        known = ", ".join(member.value for member in ReduceOp)
        raise ValueError(f"{where}: unknown reduce operation {op!r}; there are {known}") from None


def check_dtype(where: str, dtype: torch.dtype, op: ReduceOp | None) -> None:
    """Raises `UnsupportedTensor` unless `dtype` is supported and, if `op` is given, `op` can combine it."""
    if dtype not in SUPPORTED:
        names = ", ".join(str(known).removeprefix("torch.") for known in SUPPORTED)
        raise UnsupportedTensor(f"{where}: dtype {dtype} is not supported, expected one of {names}")
    if op is not None and op not in SUPPORTED[dtype]:
        names = ", ".join(sorted(known.value for known in SUPPORTED[dtype]))
        raise UnsupportedTensor(f"{where}: {op.value} does not go with {dtype}; it takes {names}")


class Folder:
    """Folds operands of one dtype by one operation for a group of `size` ranks."""

    def __init__(self, op: ReduceOp, dtype: torch.dtype, size: int) -> None:
        self.op, self.dtype, self.size = op, dtype, size
        self._kernel = (_BOOL_KERNELS if dtype == torch.bool else _KERNELS)[op]
        self._widens = dtype in _ROUNDED and op in (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PROD)
        # A float16 sum may overflow even if the mean does not, so the values are divided before they are added.
        self.scales_first = op is ReduceOp.AVG and dtype == torch.float16
        self._scales_last = op is ReduceOp.AVG and not self.scales_first
        self._scratch = torch.empty(0, dtype=torch.float32 if self._widens else dtype)

    def scale_first(self, own: Tensor) -> None:
        """Divides this rank's contribution by the group's size before the collective, if `scales_first` is true."""
        own.div_(self.size)

    def divisor(self, final: bool) -> int:
        """What a fold divides by: the group's size, or 0 if it does not divide."""
        return self.size if final and self._scales_last else 0

    def __call__(self, out: Tensor, operands: Sequence[Tensor], final: bool) -> None:
        """Writes to `out` the operands combined from left to right, divided by the group's size if `final` and avg.

        At least two operands, 1-D and of equal length; `out` may be one of them.
        """
        divides = final and self._scales_last
        if not divides and len(operands) == 2:
            self._kernel(operands[0], operands[1], out=out)
            return
        first, second, *rest = operands
        if self._widens:
            total = self._room(out.numel())
            total.copy_(first)
            for operand in operands[1:]:
                self._kernel(total, operand, out=total)
            if divides:
                total.div_(self.size)
            out.copy_(total)
            return
        total = self._room(out.numel()) if any(operand is out for operand in rest) else out
        self._kernel(first, second, out=total)
        for operand in rest:
            target = out if operand is out else total
            self._kernel(total, operand, out=target)
            total = target
        if divides:
            out.div_(self.size)

    def _room(self, elements: int) -> Tensor:
        if self._scratch.numel() < elements:
            with torch.inference_mode(False):  # it is used outside of it too
                self._scratch = torch.empty(elements, dtype=self._scratch.dtype)
        return self._scratch[:elements]
