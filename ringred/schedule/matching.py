"""Which message each receive of a schedule gets, and an order in which the steps of all ranks can finish."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple, TypeAlias

from ringred.errors import DeadlockError, OverwriteError, ScheduleError
from ringred.schedule.ir import Chunk, Send, Spec, Step, fold_groups

__all__ = ["Matched", "Message", "Node", "finishing_order", "matched_messages", "place_of"]


class Message(NamedTuple):
    sender: int
    step: int
    op: int
    chunk: Chunk


Node: TypeAlias = tuple[int, int]
"""(rank, step): all receives of one step of one rank."""

Matched: TypeAlias = dict[tuple[int, int, int], Message]
"""The message of each receive, by rank, step and operation."""


def place_of(spec: Spec, rank: int, step: int, chunk: Chunk | None = None) -> str:
    at = f"{spec.collective} on {spec.size} ranks: rank {rank}, step {step}"
    return at if chunk is None else f"{at}, chunk {chunk}"


def matched_messages(spec: Spec, steps: list[list[Step]]) -> Matched:
    """The message that each receive (rank, step, operation) gets: first in, first out per ordered pair."""
    sent: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
    for rank, rank_steps in enumerate(steps):
        for index, step in enumerate(rank_steps):
            for at, op in enumerate(step):
                if isinstance(op, Send):
                    sent[rank, op.peer].append(Message(rank, index, at, op.chunk))
    matched: Matched = {}
    for rank, rank_steps in enumerate(steps):
        for index, step in enumerate(rank_steps):
            for at, op in enumerate(step):
                if isinstance(op, Send):
                    continue
                queue = sent[op.peer, rank]
                if not queue:
                    where = place_of(spec, rank, index, op.chunk)
                    raise ScheduleError(f"{where}: receives from rank {op.peer}, which sends nothing more to it")
                message = queue.popleft()
                if message.chunk != op.chunk:
                    where = place_of(spec, rank, index, op.chunk)
                    raise ScheduleError(
                        f"{where}: expected chunk {op.chunk} from rank {op.peer}, "
                        f"which sends chunk {message.chunk} in its step {message.step}"
                    )
                matched[rank, index, at] = message
    for (rank, peer), queue in sent.items():
        if queue:
            message = queue[0]
            raise ScheduleError(
                f"{place_of(spec, rank, message.step, message.chunk)}: sent to rank {peer}, which never receives it"
            )
    return matched


def finishing_order(spec: Spec, steps: list[list[Step]], matched: Matched) -> list[Node]:
    """The steps of all ranks in an order in which each can finish."""
    consumer = {(m.sender, m.step, m.op): (rank, step) for (rank, step, _), m in matched.items()}
    data: dict[Node, set[Node]] = {}
    overwrites: dict[Node, dict[Node, Chunk]] = {}
    for rank, rank_steps in enumerate(steps):
        unread: dict[int, list[Node]] = defaultdict(list)  # unit -> who still reads it from this rank
        for index, step in enumerate(rank_steps):
            node = (rank, index)
            needs = {(rank, index - 1)}
            for at, op in enumerate(step):
                if not isinstance(op, Send):
                    message = matched[rank, index, at]
                    needs.add((message.sender, message.step - 1))
            data[node] = {need for need in needs if need[1] >= 0}
            waits: dict[Node, Chunk] = {}
            written: set[int] = set()
            for chunk, _, _ in fold_groups(step):
                written.update(chunk.units)
                for u in chunk.units:
                    for reader in unread.pop(u, ()):
                        waits[reader] = chunk
            overwrites[node] = waits
            for at, op in enumerate(step):
                # A chunk that is sent and received in one step is sent from a slot, so no peer reads the chunk itself.
                if isinstance(op, Send) and written.isdisjoint(op.chunk.units):
                    reader = consumer[rank, index, at]
                    for u in op.chunk.units:
                        unread[u].append(reader)
    order, stuck = _topological(data, overwrites)
    if not stuck:
        return order
    if not _topological(data, {})[1]:
        rank, index = min(stuck, key=lambda node: node[1])
        for node in sorted(stuck, key=lambda node: node[1]):
            for reader, chunk in overwrites[node].items():
                if reader in stuck:
                    raise OverwriteError(
                        f"{place_of(spec, *node, chunk)}: overwritten while rank {reader[0]} may still read it "
                        f"for its step {reader[1]}"
                    )
    circle = ", ".join(f"rank {r} in step {s}" for r, s in sorted(stuck)[:8])
    raise DeadlockError(f"{spec.collective} on {spec.size} ranks: deadlock of {circle}")


def _topological(
    data: dict[Node, set[Node]], overwrites: dict[Node, dict[Node, Chunk]]
) -> tuple[list[Node], set[Node]]:
    """Kahn's algorithm: the order found, and the nodes that no order reaches."""
    after: dict[Node, list[Node]] = defaultdict(list)
    missing: dict[Node, int] = {}
    for node, needs in data.items():
        every = needs | (overwrites.get(node, {}).keys() - {node})
        missing[node] = len(every)
        for need in every:
            after[need].append(node)
    ready = deque(node for node, count in missing.items() if not count)
    order = []
    while ready:
        node = ready.popleft()
        order.append(node)
        for following in after[node]:
            missing[following] -= 1
            if not missing[following]:
                ready.append(following)
    return order, missing.keys() - set(order)
