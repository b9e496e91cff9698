"""Mikami et al. (arXiv 1811.05233), figure 2: the 2×2 torus, step by step."""

from __future__ import annotations

from ringred.collectives.registry import lookup
from ringred.schedule.ir import Recv, Send


def test_the_papers_example() -> None:
    entry = lookup("all_reduce", "torus")
    group = entry.group(4, grid=(2, 2))
    held = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    steps = [entry.steps(group)(rank) for rank in range(4)]
    assert [len(rank) for rank in steps] == [4] * 4

    def play(index: int) -> None:
        flying = {}
        for rank in range(4):
            for op in steps[rank][index]:
                if isinstance(op, Send):
                    flying[rank, op.peer] = [held[rank][u] for u in op.chunk.units]
        for rank in range(4):
            for op in steps[rank][index]:
                if isinstance(op, Recv):
                    values = flying.pop((op.peer, rank))
                    for u, value in zip(op.chunk.units, values, strict=True):
                        held[rank][u] = held[rank][u] + value if op.reduce else value
        assert not flying

    def half(rank: int) -> list[int]:
        column = rank % 2
        return held[rank][2 * column : 2 * column + 2]

    play(0)  # horizontal reduce-scatter
    assert [half(rank) for rank in range(4)] == [[6, 8], [10, 12], [22, 24], [26, 28]]
    play(1)  # vertical all-reduce: its reduce-scatter ...
    play(2)  # ... and its all-gather
    assert [half(rank) for rank in range(4)] == [[28, 32], [36, 40], [28, 32], [36, 40]]
    play(3)  # horizontal all-gather
    assert held == [[28, 32, 36, 40]] * 4
