"""The kernels of folds.cu: their source, their names, and how they are called."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import torch

__all__ = ["MOST", "NAMES", "OPTIONS", "arguments", "cached", "geometry", "name_of", "source"]

MOST = 64
"""Operands, and targets, of one fold."""
OPTIONS = ("--std=c++17", "--fmad=false")  # a product and a sum are rounded each, as on the host
_THREADS = 512
_BLOCKS_EACH = 2  # blocks a multiprocessor: enough to keep memory busy, few enough to leave room for backward
_HEAD = struct.Struct("<Qiid")

_KINDS = {
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_INTEGERS = ("sum", "prod", "min", "max", "band", "bor", "bxor")
_FLOATS, _COMPLEX = _INTEGERS[:4], _INTEGERS[:2]
# A bool is a byte of 0 or 1: its sum is an "or", and its product an "and".
_OF_BOOL = {"sum": "bor", "max": "bor", "prod": "band", "min": "band"}

_CLASSES = {
    "sum": "Sum",
    "prod": "Product",
    "min": "Least",
    "max": "Greatest",
    "band": "And",
    "bor": "Or",
    "bxor": "Xor",
}
_NUMBERS = {
    "f16": "Half",
    "bf16": "BrainHalf",
    "f32": "Plain<float>",
    "f64": "Plain<double>",
    "c64": "Complex<float>",
    "c128": "Complex<double>",
}

NAMES = tuple(
    f"{op}_{kind}"
    for kind in _KINDS.values()
    for op in (_COMPLEX if kind[0] == "c" else _FLOATS if "f" in kind else _INTEGERS)
)
"""All kernels."""


def source(names: Sequence[str]) -> str:
    """The text of folds.cu with these kernels. All of them take ten seconds to compile, one a fifth of a second."""
    text = files(__package__).joinpath("folds.cu").read_text()
    return "\n".join([text, *map(_instance, names), ""])


def cached(folder: Path, name: str, what: str, compile_it: Callable[[], bytes]) -> bytes:
    """A compiled kernel: the one in `folder` that was made of the same source and `what` (device, compiler), or a new
    one, which is kept there if that is possible."""
    digest = hashlib.blake2b(f"{what}\n{OPTIONS}\n{source([name])}".encode(), digest_size=12).hexdigest()
    path = folder / f"{name}-{digest}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        made = compile_it()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(made)
        unfinished.replace(path)
    return made


def _instance(name: str) -> str:
    op, kind = name.split("_")
    numbers = _NUMBERS.get(kind)
    if numbers is None:  # an integer: overflow wraps if it is unsigned, order needs its sign
        signed = op in ("min", "max") and kind[0] == "i"
        numbers = f"Integer<{'' if signed else 'u'}int{kind[1:]}_t>"
    return f"KERNEL({op}, {_CLASSES[op]}, {kind}, {numbers})"


def name_of(op: str, dtype: torch.dtype) -> str:
    """The kernel that folds by `op`, one of `ReduceOp`."""
    if dtype == torch.bool:
        return f"{_OF_BOOL.get(op, op)}_u8"
    return f"{'sum' if op == 'avg' else op}_{_KINDS[dtype]}"


def arguments(elements: int, operands: Sequence[int], targets: Sequence[int], divisor: int) -> bytes:
    """The `Fold` of a call, from addresses. `divisor` is 0 where nothing is divided."""
    if not 0 < len(operands) <= MOST or not 0 < len(targets) <= MOST:
        raise ValueError(
            f"a fold of {len(operands)} operands into {len(targets)} targets: expected 1 to {MOST} of each"
        )
    head = _HEAD.pack(elements, len(operands), len(targets), float(divisor))
    rows = [[*addresses, *[0] * (MOST - len(addresses))] for addresses in (operands, targets)]
    return head + struct.pack(f"<{2 * MOST}Q", *rows[0], *rows[1])


def geometry(nbytes: int, processors: int) -> tuple[int, int]:
    """Blocks, and threads of each, for a fold of operands of `nbytes` bytes."""
    needed = -(-nbytes // (16 * _THREADS))
    return max(1, min(needed, _BLOCKS_EACH * processors)), _THREADS
