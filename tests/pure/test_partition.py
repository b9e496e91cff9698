"""The parameter server's partition: every element lies somewhere once, the shards are even, equal input gives equal
pieces."""

from __future__ import annotations

import itertools
import random

import pytest

from ringred.parameter_server.partition import Piece, Size, partition


def bytes_by_shard(sizes: list[Size], pieces: list[Piece], shards: int) -> list[int]:
    held = [0] * shards
    for tensor, start, stop, shard in pieces:
        held[shard] += (stop - start) * sizes[tensor].itemsize
    return held


def check_covers(sizes: list[Size], pieces: list[Piece]) -> None:
    """Every element of every tensor is in one piece."""
    by_tensor: dict[int, list[tuple[int, int]]] = {}
    for tensor, start, stop, _ in pieces:
        by_tensor.setdefault(tensor, []).append((start, stop))
    for tensor, size in enumerate(sizes):
        own = by_tensor[tensor]
        assert own[0][0] == 0
        assert own[-1][1] == size.elements
        assert all(before[1] == after[0] for before, after in itertools.pairwise(own))
        assert all(start < stop or size.elements == 0 for start, stop in own)
        assert all(start % 64 == 0 for start, _ in own)


RESNET_LIKE = [Size(64 * 3 * 49, 4)] + [
    size
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3))
    for _ in range(blocks)
    for size in (Size(width * width * 9, 4), Size(width * width * 4, 4), Size(width, 4), Size(width, 4), Size(width, 4))
]
ONE_LARGE = [Size(25_000_000, 4), Size(10, 4), Size(1000, 4)]
MANY_SMALL = [Size(200 + at % 7, 4) for at in range(20_000)]
MIXED = [Size(1_000_000, 2), Size(500_000, 8), Size(2_000_000, 4)] + [Size(1000, 2)] * 100


@pytest.mark.parametrize("shards", [*range(1, 13), 16, 31, 32, 48, 63, 64])
@pytest.mark.parametrize("sizes", [RESNET_LIKE, ONE_LARGE, MANY_SMALL, MIXED], ids=["resnet", "one", "many", "mixed"])
def test_shards_are_even_within_five_percent(sizes: list[Size], shards: int) -> None:
    pieces = partition(sizes, shards)
    check_covers(sizes, pieces)
    held = bytes_by_shard(sizes, pieces, shards)
    assert max(held) <= 1.05 * sum(held) / shards
    assert min(held) >= 0.95 * sum(held) / shards
    assert pieces == partition(sizes, shards)


@pytest.mark.parametrize("shards", [1, 4])
def test_pieces_are_short_enough_to_be_encrypted_one_after_the_other(shards: int) -> None:
    sizes = [Size(25_000_000, 4), Size(3_000_000, 4, cuttable=False), Size(10, 4), Size(1 << 20, 4)]
    pieces = partition(sizes, shards, longest=4 << 20)
    check_covers(sizes, pieces)
    lengths = [4 * (piece.stop - piece.start) for piece in pieces if piece.tensor == 0]
    assert max(lengths) <= 4 << 20
    assert max(lengths) - min(lengths) <= 2 * 64 * 4, "equal ones"
    assert len(lengths) == shards * -(-4 * 25_000_000 // (shards * 4 << 20))
    assert [piece[1:3] for piece in pieces if piece.tensor == 1] == [(0, 3_000_000)]
    of_four_mib = [piece for piece in pieces if piece.tensor == 3]
    assert len(of_four_mib) == shards, "what fits is not cut"
    assert len(partition(sizes, shards)) < len(pieces), "only where it is asked for"


def test_odd_sizes_are_covered() -> None:
    generator = random.Random(7)
    for _ in range(300):
        sizes = [
            Size(generator.choice([0, 1, 15, 16, 17, 33, 1000, 4097]), generator.choice([1, 2, 4, 8]), flip)
            for flip in generator.choices([True, False], k=generator.randint(1, 9))
        ]
        shards = generator.randint(1, 9)
        pieces = partition(sizes, shards)
        check_covers(sizes, pieces)
        whole = {tensor for tensor, size in enumerate(sizes) if not size.cuttable}
        assert all(sum(piece.tensor == tensor for piece in pieces) == 1 for tensor in whole)


def test_tensors_that_come_later_fill_the_emptiest_shards() -> None:
    assert [piece.shard for piece in partition([Size(10, 4), Size(9, 4)], 3, [100, 0, 10])] == [1, 2]
    with pytest.raises(ValueError, match="the loads of 2 shards, got 3"):
        partition([Size(1, 1)], 2, [0, 0, 0])
