"""The table that every transport has to pass: all-reduce algorithms × operations × dtypes, and the other collectives.

Inputs are integer-valued and so small that the result is exact in every dtype, whatever the order of addition.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

from ringred.collectives.registry import algorithms
from ringred.communicator import Communicator
from ringred.runtime.folds import SUPPORTED, ReduceOp

SIZES = (0, 1, 3, 1000, 65537)

_one_thread = threading.Lock()  # ranks that are threads go through the table together: one works out what all expect


def contribution(rank: int, size: int, count: int, dtype: torch.dtype, op: ReduceOp) -> Tensor:
    """What rank `rank` puts in."""
    index = torch.arange(count)
    if dtype == torch.bool:
        return (index * 7 + rank * 3) % 5 < 3
    if op is ReduceOp.PROD:
        values = torch.where((index + rank) % 5 == 0, 2, 1)
        if dtype.is_signed:
            values = torch.where((index * 3 + rank) % 4 == 0, -values, values)
    elif op is ReduceOp.AVG:
        values = size * ((index + 2 * rank) % 3)
    else:
        values = (index * 7 + rank * 3) % 5
        if dtype.is_signed and op not in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR):
            values = values - 2
    if dtype.is_complex:
        return torch.complex(values.double(), torch.zeros(count, dtype=torch.float64) + (rank % 2)).to(dtype)
    return values.to(dtype)


@lru_cache(maxsize=2)
def expected(size: int, count: int, dtype: torch.dtype, op: ReduceOp) -> Tensor:
    """The reduction in the widest type, brought back to `dtype`."""
    parts = [contribution(rank, size, count, dtype, op) for rank in range(size)]
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    stack = torch.stack(parts).to(torch.bool if dtype == torch.bool else wide)
    if dtype == torch.bool:
        result = stack.any(0) if op in (ReduceOp.SUM, ReduceOp.MAX, ReduceOp.BOR) else stack.all(0)
        if op is ReduceOp.BXOR:
            result = stack.sum(0) % 2 == 1
        return result
    if op is ReduceOp.PROD:
        return stack.prod(0).to(dtype)
    if op in (ReduceOp.MIN, ReduceOp.MAX):
        return (stack.amin(0) if op is ReduceOp.MIN else stack.amax(0)).to(dtype)
    if op in (ReduceOp.SUM, ReduceOp.AVG):
        total = stack.sum(0)
        return (total / size if op is ReduceOp.AVG else total).to(dtype)
    result = stack[0]
    for part in stack[1:]:
        result = {ReduceOp.BAND: result & part, ReduceOp.BOR: result | part, ReduceOp.BXOR: result ^ part}[op]
    return result.to(dtype)


def check_all_reduce(comm: Communicator, names: list[str] | None = None) -> int:
    """Every algorithm × operation × dtype × size; returns the number of all-reduces that were right."""
    names = names or [entry.name for entry in algorithms("all_reduce").values() if not entry.native]
    right = 0
    for dtype, operations in SUPPORTED.items():
        for op in sorted(operations):
            for count in SIZES:
                with _one_thread:
                    wanted = expected(comm.size, count, dtype, op)
                mine = contribution(comm.rank, comm.size, count, dtype, op)
                for name in names:
                    tensor = mine.clone()
                    comm.all_reduce(tensor, op, algorithm=name)
                    assert torch.equal(tensor, wanted), f"{name} {op.value} {dtype} {count} on {comm.size} ranks"
                    right += 1
    return right


def check_others(comm: Communicator) -> int:
    """Every other collective, by every algorithm, with even, uneven, tiny and empty shares."""
    size, rank = comm.size, comm.rank
    right = 0

    def values(count: int, seed: int) -> Tensor:
        return (torch.arange(count) * 3 + seed).to(torch.float32)

    for lengths in ([4] * size, [1] * size, [0] * size, list(range(size)), [700 * (r % 2) + r for r in range(size)]):
        parts = [values(length, 100 * owner) for owner, length in enumerate(lengths)]
        total = sum(lengths)
        for name in algorithms("all_gather"):
            listed = [torch.full((length,), -1.0) for length in lengths]
            comm.all_gather(listed, parts[rank], algorithm=name)
            assert all(torch.equal(got, part) for got, part in zip(listed, parts, strict=True)), f"all_gather {name}"
            right += 1
        for name in algorithms("reduce_scatter"):
            for op, factor in (("sum", size), ("avg", 1), ("max", 1)):
                given = [part.clone() for part in parts]
                output = torch.full((lengths[rank],), -1.0)
                comm.reduce_scatter(output, given, op, algorithm=name)
                assert torch.equal(output, parts[rank] * factor), f"reduce_scatter {name} {op} {lengths}"
                assert all(torch.equal(a, b) for a, b in zip(given, parts, strict=True)), "its input was changed"
                right += 1
        for root in {0, size - 1}:
            at_root = rank == root
            listed = [torch.full((length,), -1.0) for length in lengths]
            comm.gather(parts[rank], listed if at_root else None, root)
            assert not at_root or all(torch.equal(a, b) for a, b in zip(listed, parts, strict=True)), "gather"
            output = torch.full((lengths[rank],), -1.0)
            comm.scatter(output, parts if at_root else None, root)
            assert torch.equal(output, parts[rank]), "scatter"
            for name in algorithms("broadcast"):
                tensor = values(total, 5) if at_root else torch.full((total,), -1.0)
                comm.broadcast(tensor, root, algorithm=name)
                assert torch.equal(tensor, values(total, 5)), f"broadcast {name}"
                right += 1
            for name in algorithms("reduce"):
                tensor = values(total, rank)
                comm.reduce(tensor, root, "sum", algorithm=name)
                wanted = sum(values(total, r) for r in range(size)) if at_root else values(total, rank)
                assert torch.equal(tensor, wanted), f"reduce {name}"
                right += 1
        outgoing = [values(length * (1 + rank), 1000 * rank + peer) for peer, length in enumerate(lengths)]
        incoming = [torch.full((lengths[rank] * (1 + peer),), -1.0) for peer in range(size)]
        comm.all_to_all(incoming, outgoing)
        for peer in range(size):
            assert torch.equal(incoming[peer], values(lengths[rank] * (1 + peer), 1000 * peer + rank)), "all_to_all"
        right += 3
    flat = torch.empty(3 * size)
    comm.all_gather(flat, values(3, rank))
    assert torch.equal(flat, torch.cat([values(3, r) for r in range(size)]))
    square = torch.empty(size * 2)
    comm.all_to_all(square, torch.arange(2.0 * size) + 100 * rank)
    assert torch.equal(square, torch.cat([torch.arange(2.0) + 2 * rank + 100 * r for r in range(size)]))
    comm.barrier()
    if size > 1:
        left, right_peer = (rank - 1) % size, (rank + 1) % size
        got = torch.empty(100_000)
        for turn in range(3):
            outgoing = values(100_000, rank + turn)
            sent = comm.send(outgoing, right_peer, async_op=True)
            outgoing.zero_()
            comm.recv(got, left)
            sent.wait()
            assert torch.equal(got, values(100_000, left + turn)), "everybody sends to the right first"
        if rank % 2 == 0:
            comm.send(values(9, rank), right_peer)
        if left % 2 == 0:
            comm.recv(got[:9], left)
            assert torch.equal(got[:9], values(9, left))
    inner = comm.split(rank % 2, key=-rank)
    assert inner is not None
    tensor = torch.tensor([float(rank)])
    inner.all_reduce(tensor)
    assert tensor.item() == sum(r for r in range(size) if r % 2 == rank % 2)
    assert inner.rank == len([r for r in range(size) if r % 2 == rank % 2 and r > rank])
    inner.close()
    assert comm.split(None) is None
    return right
