"""Which messages of a schedule may be written into the receiver's memory by their sender."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from ringred.schedule.ir import Send, Spec, Step, fold_groups
from ringred.schedule.matching import Matched, Node

__all__ = ["put_safe"]


def put_safe(
    spec: Spec, steps: list[list[Step]], matched: Matched, order: list[Node]
) -> frozenset[tuple[int, int, int]]:
    """The replacing messages whose sender knows that the receiver, if it has entered, no longer uses its own copy.

    What a rank knows is kept as a vector clock for each unit. `clocks[q][u, p] = s + 1` means that rank q knows that
    rank p has posted its sends of u in step s, and so has finished its receives of u in all steps before s; 0 means
    that p may not even have entered. Only messages that carry u pass this knowledge on: a program divides messages
    into segments, and a segment of one unit says nothing about the progress of another unit. For any single element,
    receives come before the sends that read what they wrote, whatever the segments are.
    """
    size = spec.size
    consumer = {(m.sender, m.step, m.op): (rank, step) for (rank, step, _), m in matched.items()}
    # unit -> what must be known before another rank writes it here: (rank, clock value)
    accesses: list[dict[int, list[tuple[int, int]]]] = [defaultdict(list) for _ in range(size)]
    needed: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for rank, rank_steps in enumerate(steps):
        mine = accesses[rank]
        for index, step in enumerate(rank_steps):
            for at, op in enumerate(step):
                if isinstance(op, Send):
                    reader, reader_step = consumer[rank, index, at]
                    for u in op.chunk.units:
                        mine[u] += [(rank, index + 1), (reader, reader_step + 2)]
            for at, op in enumerate(step):
                if isinstance(op, Send):
                    continue
                if not op.reduce:
                    message = matched[rank, index, at]
                    needed[message.sender, message.step, message.op] = [
                        (u, *need) for u in op.chunk.units for need in mine[u]
                    ]
            for chunk, _, _ in fold_groups(step):
                for u in chunk.units:
                    mine[u] = [(rank, index + 2)]
    clocks: list[npt.NDArray[np.int32]] = [np.zeros((spec.units, size), np.int32) for _ in range(size)]
    posted: dict[Node, npt.NDArray[np.int32]] = {}
    safe = set()

    def post(rank: int, index: int) -> None:
        clock = clocks[rank]
        clock[:, rank] = index + 1
        if index >= len(steps[rank]):
            return
        posted[rank, index] = clock.copy()
        for at, op in enumerate(steps[rank][index]):
            if isinstance(op, Send):
                needs = needed.get((rank, index, at))
                if needs is not None and all(clock[u, peer] >= value for u, peer, value in needs):
                    safe.add((rank, index, at))

    for rank in range(size):
        post(rank, 0)
    for rank, index in order:
        for at, op in enumerate(steps[rank][index]):
            if not isinstance(op, Send):
                message = matched[rank, index, at]
                rows = slice(op.chunk.start, op.chunk.stop)
                theirs = posted[message.sender, message.step][rows]
                np.maximum(clocks[rank][rows], theirs, out=clocks[rank][rows])
        post(rank, index + 1)
    return frozenset(safe)
