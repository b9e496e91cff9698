"""Compiles a plan to a tape, which the compiled player plays: the same instructions as numbers and addresses.

`native/layout.h` has the form of a tape and its instructions, `native/tape.c` plays it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ringred.native import player
from ringred.runtime.folds import Folder, ReduceOp
from ringred.transports.base import Tape

__all__ = ["compiled", "kernel", "past"]

_SEND, _RECEIVE, _FOLD, _TAKE, _WAIT_SENT, _SNAPSHOT, _END = range(7)  # the first six as in executor.py
_MAY_PUT, _BUFFERED = 1, 2  # how a send is made
_LEND, _PAST = 1, 2  # how a receive, or a copy
_COPIED_PAST, _RECEIVED_PAST = 4 << 20, 32 << 20  # bytes of a copy, and of all receives, that no cache keeps
_BLOCK_BITS = 16  # what is read again is known by blocks of 64 KiB
_KINDS = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.bfloat16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bool: 9,
}
_PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64}
_OPERATIONS = {op: at for at, op in enumerate(("sum", "prod", "min", "max", "band", "bor", "bxor"))} | {"avg": 0}


def kernel(folder: Folder, level: int = 2) -> tuple[int, int] | None:
    """The address of the fold, and how many of its elements are one of the tensor's; None if there is none.

    `level` is the highest set of instructions that it may use, see native/folds.c."""
    dtype, parts = folder.dtype, 1
    if dtype in _PARTS:
        if folder.op is not ReduceOp.SUM:
            return None
        dtype, parts = _PARTS[dtype], 2
    assert player is not None, "tapes are compiled for a player"
    address = player.kernel(_KINDS[dtype], _OPERATIONS[folder.op.value], level) if dtype in _KINDS else 0
    return (address, parts) if address else None


def compiled(
    operations: Sequence[tuple[Any, ...]],
    requests: int,
    folder: Folder | None,
    exposed: Tensor | None,
    links: Mapping[int, int],
) -> Tape | None:
    """The tape of a plan's operations; `links` are the numbers of the links to the peers. None if the player does not
    have the plan's fold."""
    fold = None if folder is None else kernel(folder)
    if folder is not None and fold is None:
        return None
    passing = past(operations)
    words: list[int] = []
    sent, received, timed = [], [], 0
    element = 1
    for at, operation in enumerate(operations):
        code = operation[0]
        if code == _SEND:
            _, request, peer, source, put, buffered = operation
            how = _MAY_PUT * put | _BUFFERED * buffered
            words += (code, request, links[peer], source.data_ptr(), source.nbytes, how)
            sent.append(source.nbytes)
            element = source.element_size()
        elif code == _RECEIVE:
            _, request, peer, destination, lend = operation
            how = _LEND * lend | _PAST * (at in passing)
            words += (code, request, links[peer], destination.data_ptr(), destination.nbytes, how)
            received.append(destination.nbytes)
            element = destination.element_size()
        elif code == _FOLD:
            assert folder is not None, "only reducing collectives fold"
            assert fold is not None, "looked up above"
            _, numbers, out, own, final, _, _ = operation
            address, parts = fold
            size = out.element_size() // parts
            divisor = _bits(folder.divisor(final))
            words += (code, out.data_ptr(), out.numel() * parts, size, address, divisor, own, len(numbers), *numbers)
            timed += 1
        elif code == _TAKE:
            words += (code, operation[1])
            timed += 1
        elif code == _WAIT_SENT:
            words += (code, operation[1])
        else:
            _, target, source = operation
            words += (code, target.data_ptr(), source.data_ptr(), source.nbytes, _PAST * (at in passing))
    words.append(_END)
    bounds = (0, 0) if exposed is None else (exposed.data_ptr(), exposed.data_ptr() + exposed.nbytes)
    moved = (len(sent), sum(sent), len(received), sum(received))
    return Tape(words, requests, bounds, moved, timed, element)


def past(operations: Sequence[tuple[Any, ...]]) -> set[int]:
    """The places of receives and copies that go past the cache: so large that none keeps them, and of memory that the
    plan does not read after them. Beside folds receives do not."""
    folds = any(operation[0] == _FOLD for operation in operations)
    received = 0 if folds else sum(operation[3].nbytes for operation in operations if operation[0] == _RECEIVE)
    copied = max((operation[1].nbytes for operation in operations if operation[0] == _SNAPSHOT), default=0)
    found: set[int] = set()
    if received < _RECEIVED_PAST and copied < _COPIED_PAST:
        return found
    read: set[int] = set()  # by what comes later
    for at in reversed(range(len(operations))):
        operation = operations[at]
        code = operation[0]
        if code == _SEND:
            read.update(_blocks(operation[3]))
        elif code == _FOLD:
            read.update(_blocks(operation[2]))
        elif code == _SNAPSHOT:
            if operation[1].nbytes >= _COPIED_PAST and read.isdisjoint(_blocks(operation[1])):
                found.add(at)
            read.update(_blocks(operation[2]))
        elif code == _RECEIVE and received >= _RECEIVED_PAST and read.isdisjoint(_blocks(operation[3])):
            found.add(at)
    return found


def _blocks(tensor: Tensor) -> range:
    start = tensor.data_ptr()
    return range(start >> _BLOCK_BITS, (start + tensor.nbytes - 1 >> _BLOCK_BITS) + 1)


def _bits(value: float) -> int:
    """The bits of a double as a signed number."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)
