"""Which part of which tensor lies on which shard: large tensors are cut, small ones packed, by bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple

__all__ = ["SEALED_BYTES", "Piece", "Size", "partition"]

_ALIGNED = 64  # elements: torch's kernels treat the parts of a cut tensor as they treat the whole, to the bit
_LARGE = 0.025  # of a shard's share of all bytes: a tensor above it is cut over all shards
SEALED_BYTES = 1 << 20
"""The longest pieces where what goes over the network is encrypted: ZeroMQ encrypts each as a whole before it sends any
of it, and decrypts it once all of it is there."""


class Size(NamedTuple):
    """A tensor's number of elements, and the bytes of one; one that is not `cuttable` lies on one shard as a whole."""

    elements: int
    itemsize: int
    cuttable: bool = True


class Piece(NamedTuple):
    """Elements `start` to `stop` of the flat tensor `tensor` (an index), on shard `shard`."""

    tensor: int
    start: int
    stop: int
    shard: int


def partition(sizes: Sequence[Size], shards: int, loads: Iterable[int] = (), longest: int | None = None) -> list[Piece]:
    """The pieces of all tensors, in the tensors' order, each tensor's own in the order of their elements.

    `loads` are the bytes that each shard holds already. Tensors of more than 2.5 % of a shard's share are cut into
    equal parts for all shards; the others go, largest first, to the shard with the fewest bytes (Graham, Bounds on
    Multiprocessing Timing Anomalies, 1969). What then lies on one shard in more than `longest` bytes is cut again,
    into equal pieces. Where every tensor may be cut, the fullest shard has at most 5 % more than the mean, down to a
    granularity of 64 elements. Deterministic: equal input, equal pieces.
    """
    held = list(loads) or [0] * shards
    if len(held) != shards:
        raise ValueError(f"partition: expected the loads of {shards} shards, got {len(held)}")
    threshold = _LARGE * sum(size.elements * size.itemsize for size in sizes) / shards
    pieces: list[Piece] = []
    small: list[int] = []
    for tensor, (elements, itemsize, cuttable) in enumerate(sizes):
        if cuttable and shards > 1 and elements * itemsize > threshold and elements >= 2 * _ALIGNED:
            # Equal parts differ by up to 64 elements; the longer ones go to the shards that hold least.
            emptiest = sorted(range(shards), key=lambda shard: (held[shard], shard))
            for (start, stop), shard in zip(_equal_parts(elements, shards), emptiest, strict=False):
                pieces.append(Piece(tensor, start, stop, shard))
                held[shard] += (stop - start) * itemsize
        else:
            small.append(tensor)
    queue = [(nbytes, shard) for shard, nbytes in enumerate(held)]
    heapify(queue)
    for tensor in sorted(small, key=lambda at: (-sizes[at].elements * sizes[at].itemsize, at)):
        nbytes, shard = queue[0]
        pieces.append(Piece(tensor, 0, sizes[tensor].elements, shard))
        heapreplace(queue, (nbytes + sizes[tensor].elements * sizes[tensor].itemsize, shard))
    if longest is not None:
        pieces = [short for piece in pieces for short in _shortened(piece, sizes[piece.tensor], longest)]
    return sorted(pieces)


def _shortened(piece: Piece, size: Size, longest: int) -> list[Piece]:
    """The piece in equal pieces that are not too long."""
    elements = piece.stop - piece.start
    if not size.cuttable or elements * size.itemsize <= longest:
        return [piece]
    parts = _equal_parts(elements, -(-elements * size.itemsize // longest))
    return [piece._replace(start=piece.start + start, stop=piece.start + stop) for start, stop in parts]


def _equal_parts(elements: int, parts: int) -> list[tuple[int, int]]:
    """At most `parts` ranges, the longer ones first, each beginning at a multiple of 64 elements; none is empty."""
    lines = -(-elements // _ALIGNED)
    short, longer = divmod(lines, parts)
    ranges: list[tuple[int, int]] = []
    start = 0
    for part in range(min(parts, lines)):
        stop = min(elements, start + (short + (part < longer)) * _ALIGNED)
        ranges.append((start, stop))
        start = stop
    return ranges
