"""Proves a schedule: runs all its ranks symbolically, in this process, and raises an exception on the first fault.

The values are expressions: which ranks' contributions were combined, and in which order. Combining two values is
assumed to be commutative but not associative, so equal expressions have equal bits, whatever the operation.
Time is the partial order of the executor, assuming no buffering at all: the receives of a step wait for the steps
before, for the matching sends, and for earlier sends that still read the data that they overwrite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ringred.errors import ScheduleError
from ringred.schedule.ir import Chunk, Send, Spec, Step, fold_groups, is_final, last_writes
from ringred.schedule.matching import Matched, Node, finishing_order, matched_messages, place_of
from ringred.schedule.put_safe import put_safe

__all__ = ["Proof", "verify"]


@dataclass(frozen=True, slots=True)
class Proof:
    """What a verified schedule does; the tuples are indexed by rank.

    `messages`, `units_sent`, `units_received` count one collective. `rank_ordered`: every reduced value is
    one fold of all contributions in rank order, so its bits depend on nothing but the inputs. `put_safe`
    holds the sends (rank, step, operation) of chunks that replace the receiver's copy, if the sender knows that the
    receiver no longer uses that copy once it has entered the collective. A transport with windows may write such a
    chunk directly into the receiver's memory if it sees that the receiver has entered.
    """

    spec: Spec
    steps: tuple[int, ...]
    messages: tuple[int, ...]
    units_sent: tuple[int, ...]
    units_received: tuple[int, ...]
    rank_ordered: bool
    put_safe: frozenset[tuple[int, int, int]]


class _Expressions:
    """Gives every distinct expression a number: values with the same number have the same bits.

    For expression n, `ranks[n]` is the bit mask of the ranks in it; `divided[n]` says that a mean was already divided,
    by a fold that is the last write to units that are kept; `rank_ordered[n]` says that it is one fold of contributions
    in rank order, or a single contribution.
    """

    def __init__(self) -> None:
        self.ranks: list[int] = []
        self.divided: list[bool] = []
        self.rank_ordered: list[bool] = []
        self._folds: dict[tuple[tuple[int, ...], bool], int] = {}

    def contribution(self, rank: int) -> int:
        return self._add(1 << rank, False, True)

    def fold(self, operands: tuple[int, ...], divided: bool) -> int:
        pair = len(operands) == 2
        if pair and operands[0] > operands[1]:
            operands = operands[::-1]
        number = self._folds.get((operands, divided))
        if number is None:
            masks = [self.ranks[operand] for operand in operands]
            contributions = all(mask & (mask - 1) == 0 for mask in masks)
            number = self._add(sum(masks), divided, contributions and (pair or masks == sorted(masks)))
            self._folds[operands, divided] = number
        return number

    def _add(self, ranks: int, divided: bool, rank_ordered: bool) -> int:
        self.ranks.append(ranks)
        self.divided.append(divided)
        self.rank_ordered.append(rank_ordered)
        return len(self.ranks) - 1


_NOTHING = -1  # in the place of an expression: the rank does not hold the unit


def verify(spec: Spec, schedule: Callable[[int], Iterable[Step]], *, puts: bool = False) -> Proof:
    """Proves that `schedule(rank)`, run by all ranks, leads from the start state to the end state given by `spec`.

    Raises `ScheduleError` with rank, step and chunk for a malformed spec or operation, an unmatched send or receive, a
    doubled or missing contribution, or a chunk that has different bits on different ranks at the end; `DeadlockError`
    if operations wait for each other; `OverwriteError` if they do so only because a chunk would be overwritten while a
    peer may still read it. `puts=True` also computes `Proof.put_safe`.
    """
    _check_spec(spec)
    steps = [list(schedule(rank)) for rank in range(spec.size)]
    _check_operations(spec, steps)
    matched = matched_messages(spec, steps)
    order = finishing_order(spec, steps, matched)
    rank_ordered = _run(spec, steps, matched, order)
    sends = [[op for step in rank for op in step if isinstance(op, Send)] for rank in steps]
    received = [sum(len(op.chunk.units) for step in rank for op in step if not isinstance(op, Send)) for rank in steps]
    return Proof(
        spec=spec,
        steps=tuple(len(rank) for rank in steps),
        messages=tuple(len(rank) for rank in sends),
        units_sent=tuple(sum(len(op.chunk.units) for op in rank) for rank in sends),
        units_received=tuple(received),
        rank_ordered=rank_ordered,
        put_safe=put_safe(spec, steps, matched, order) if puts else frozenset(),
    )


def _check_spec(spec: Spec) -> None:
    if (len(spec.sources), len(spec.wants)) != (spec.units, spec.size):
        raise ScheduleError(
            f"{spec.collective}: a spec of {spec.units} units and {spec.size} ranks names the sources of "
            f"{len(spec.sources)} units and what {len(spec.wants)} ranks want"
        )
    for what, sets, end in (("source", spec.sources, spec.size), ("wanted unit", spec.wants, spec.units)):
        for index in frozenset[int]().union(*sets):
            if not 0 <= index < end:
                raise ScheduleError(f"{spec.collective}: {what} {index} is none of 0..{end - 1}")


def _check_operations(spec: Spec, steps: list[list[Step]]) -> None:
    for rank, rank_steps in enumerate(steps):
        for index, step in enumerate(rank_steps):
            for op in step:
                if not 0 <= op.peer < spec.size or op.peer == rank:
                    where = place_of(spec, rank, index, op.chunk)
                    raise ScheduleError(f"{where}: {op} names no other rank of 0..{spec.size - 1}")
                if not 0 <= op.chunk.start < op.chunk.stop <= spec.units:
                    where = place_of(spec, rank, index, op.chunk)
                    raise ScheduleError(f"{where}: {op} is no run of units of 0..{spec.units - 1}")
            groups = fold_groups(step)
            for chunk, _, peers in groups:
                if len(peers) > len(set(peers)):
                    raise ScheduleError(
                        f"{place_of(spec, rank, index, chunk)}: one fold takes two messages of one rank, of {peers}"
                    )
            turn = {chunk: at for at, (chunk, _, _) in enumerate(groups)}
            latest: dict[int, int] = {}
            for op in step:
                if not isinstance(op, Send):
                    if turn[op.chunk] < latest.get(op.peer, 0):
                        raise ScheduleError(
                            f"{place_of(spec, rank, index, op.chunk)}: received from rank {op.peer} after a chunk "
                            "whose fold comes later; folds of one step take each peer's messages in order"
                        )
                    latest[op.peer] = turn[op.chunk]
            writes = [chunk for chunk, _, _ in groups]
            for at, chunk in enumerate(writes):
                for other in writes[:at]:
                    if chunk.overlaps(other):
                        raise ScheduleError(
                            f"{place_of(spec, rank, index, chunk)}: written together with chunk {other}; "
                            "receives of one step may share a chunk only to fold into all of it"
                        )


def _run(spec: Spec, steps: list[list[Step]], matched: Matched, order: list[Node]) -> bool:
    """Runs the schedule on expressions and checks the end state; returns `Proof.rank_ordered`."""
    expressions = _Expressions()
    held = [[_NOTHING] * spec.units for _ in range(spec.size)]
    for u, sources in enumerate(spec.sources):
        for rank in sources:
            held[rank][u] = expressions.contribution(rank)
    last_write = [last_writes(rank_steps) for rank_steps in steps]
    in_flight: dict[tuple[int, int, int], list[int]] = {}

    def post_sends(rank: int, index: int) -> None:
        if index >= len(steps[rank]):
            return
        for at, op in enumerate(steps[rank][index]):
            if isinstance(op, Send):
                values = held[rank][op.chunk.start : op.chunk.stop]
                if _NOTHING in values:
                    missing = op.chunk.start + values.index(_NOTHING)
                    raise ScheduleError(
                        f"{place_of(spec, rank, index, op.chunk)}: sends unit {missing}, which it does not hold"
                    )
                in_flight[rank, index, at] = values

    for rank in range(spec.size):
        post_sends(rank, 0)
    for rank, index in order:
        mine = held[rank]
        folds: dict[Chunk, list[tuple[int, list[int]]]] = {}
        for at, op in enumerate(steps[rank][index]):
            if not isinstance(op, Send):
                message = matched[rank, index, at]
                values = in_flight.pop((message.sender, message.step, message.op))
                if op.reduce:
                    folds.setdefault(op.chunk, []).append((op.peer, values))
                else:
                    mine[op.chunk.start : op.chunk.stop] = values
        for chunk, operands in folds.items():
            operands.append((rank, mine[chunk.start : chunk.stop]))
            final = is_final(chunk, index, last_write[rank], spec.wants[rank].__contains__)
            where = place_of(spec, rank, index, chunk)
            mine[chunk.start : chunk.stop] = _fold(expressions, chunk, sorted(operands), final, where)
        post_sends(rank, index + 1)
    return _check_end(spec, steps, held, expressions)


def _fold(
    expressions: _Expressions, chunk: Chunk, operands: list[tuple[int, list[int]]], final: bool, where: str
) -> list[int]:
    """Combines `operands`, the values of `chunk` by rank, and returns one expression for each unit."""
    ranks, divided = expressions.ranks, expressions.divided
    result = []
    for u, values in zip(chunk.units, zip(*(values for _, values in operands), strict=True), strict=True):
        if _NOTHING in values:
            raise ScheduleError(f"{where}: reduces into unit {u}, which it does not hold")
        if any(divided[value] for value in values):
            raise ScheduleError(
                f"{where}: unit {u} is added to although it was whole: a mean would have been divided already"
            )
        seen = 0
        for (peer, _), value in zip(operands, values, strict=True):
            if twice := seen & ranks[value]:
                raise ScheduleError(
                    f"{where}: the contribution of rank {(twice & -twice).bit_length() - 1} to "
                    f"unit {u} is added twice (again by rank {peer})"
                )
            seen |= ranks[value]
        result.append(expressions.fold(values, final))
    return result


def _check_end(spec: Spec, steps: list[list[Step]], held: list[list[int]], expressions: _Expressions) -> bool:
    whole = [sum(1 << rank for rank in sources) for sources in spec.sources]
    agreed: dict[int, tuple[int, int]] = {}
    rank_ordered = True
    for rank, wanted in enumerate(spec.wants):
        end = f"{place_of(spec, rank, len(steps[rank]))} (the end)"
        for u in sorted(wanted):
            value = held[rank][u]
            ranks = 0 if value == _NOTHING else expressions.ranks[value]
            if value == _NOTHING or ranks != whole[u]:
                missing = [r for r in spec.sources[u] if not ranks & (1 << r)]
                extra = [r for r in range(spec.size) if ranks & ~whole[u] & (1 << r)]
                raise ScheduleError(
                    f"{end}, unit {u}: misses the contribution of ranks {missing}, has that of {extra} besides"
                )
            if len(spec.sources[u]) > 1 and not expressions.divided[value]:
                raise ScheduleError(
                    f"{end}, unit {u}: whole, but made by no fold that is the last write of all its units on a rank "
                    "that keeps them: a mean would not have been divided"
                )
            other, expression = agreed.setdefault(u, (rank, value))
            if expression != value:
                raise ScheduleError(
                    f"{end}, unit {u}: was added in another order than on rank {other}; bits would differ"
                )
            rank_ordered &= expressions.rank_ordered[value]
    return rank_ordered
