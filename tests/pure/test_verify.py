"""Every registered schedule is proved, and no single mutation of one gets past the verifier."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ringred.collectives.registry import COLLECTIVES, Algorithm, algorithms, groups, lookup, spec_of
from ringred.errors import DeadlockError, OverwriteError, ScheduleError
from ringred.schedule.ir import Chunk, Group, Recv, Send, Spec, Step, unit
from ringred.schedule.verify import verify

EVERY = [entry for name in COLLECTIVES for entry in algorithms(name).values() if not entry.native]
SIZES = [*range(1, 18), 32, 64, 128]


def label(entry: Algorithm) -> str:
    return f"{entry.collective}-{entry.name}"


@pytest.mark.parametrize("entry", EVERY, ids=label)
def test_is_proved_on_every_size_and_grid(entry: Algorithm) -> None:
    proved = 0
    for size in SIZES:
        for group in groups(entry, size):
            proof = verify(spec_of(entry, group), entry.steps(group))
            assert len(proof.messages) == size
            proved += 1
    assert proved >= (1 if entry.collective == "send_recv" else len(SIZES))


def test_grids_of_a_torus_are_all_factorisations() -> None:
    grids = {group.grid for group in groups(lookup("all_reduce", "torus"), 12)}
    assert grids == {(12, 1), (2, 6), (6, 2), (3, 4), (4, 3), (2, 2, 3), (2, 3, 2), (3, 2, 2)}


# ---------------------------------------------------------------------- mutations


def mutations(step: Step, size: int, units: int) -> Iterator[tuple[str, Step]]:
    """Every step that differs from `step` in one operation."""
    for at, op in enumerate(step):

        def replaced(*new: Send | Recv, at: int = at) -> Step:
            return (*step[:at], *new, *step[at + 1 :])

        yield f"drop {op}", replaced()
        yield f"double {op}", replaced(op, op)
        if isinstance(op, Recv):
            yield f"flip {op}", replaced(op._replace(reduce=not op.reduce))
        for peer in range(size):
            if peer != op.peer:
                yield f"peer {peer} in {op}", replaced(op._replace(peer=peer))
        width = op.chunk.stop - op.chunk.start
        for start in range(units):
            for stop in {start + width, start + 1, start + width - 1, start + width + 1}:
                if start < stop <= units and (start, stop) != op.chunk:
                    yield f"chunk {start}:{stop} in {op}", replaced(op._replace(chunk=Chunk(start, stop)))


def mutated_groups(entry: Algorithm) -> list[Group]:
    if entry.collective == "send_recv":
        return [entry.group(2)]
    if entry.grids is not None:
        return [entry.group(6, grid=(2, 3)), entry.group(5)]
    return [entry.group(5, root=2 if entry.collective in ("broadcast", "reduce", "gather", "scatter") else 0)]


def caught(spec: Spec, steps: list[list[Step]]) -> bool:
    try:
        verify(spec, lambda rank: steps[rank])
    except ScheduleError:
        return True
    return False


@pytest.mark.parametrize("entry", EVERY, ids=label)
def test_catches_every_mutation_of_every_operation(entry: Algorithm) -> None:
    tried = 0
    for group in mutated_groups(entry):
        spec = spec_of(entry, group)
        steps = [entry.steps(group)(rank) for rank in range(group.size)]
        for rank in range(group.size):
            for index, step in enumerate(steps[rank]):
                for what, mutant in mutations(step, group.size, spec.units):
                    broken = [list(rank_steps) for rank_steps in steps]
                    broken[rank][index] = mutant
                    assert caught(spec, broken), f"{group}: rank {rank}, step {index}: {what} was not caught"
                    tried += 1
    assert tried > 0


# ---------------------------------------------------------------------- what each error says

EVERYONE = frozenset({0, 1})
TWO_UNITS = Spec("all_reduce", 2, 2, (EVERYONE, EVERYONE), (frozenset({0, 1}),) * 2)
ONE_UNIT = Spec("all_reduce", 2, 1, (EVERYONE,), (frozenset({0}),) * 2)


def test_names_rank_step_and_chunk() -> None:
    steps = [[(Send(1, unit(0)), Recv(1, unit(0), True))], [(Send(0, unit(1)), Recv(0, unit(0), True))]]
    with pytest.raises(ScheduleError, match=r"rank 0, step 0, chunk 0: expected chunk 0 from rank 1.*sends chunk 1"):
        verify(TWO_UNITS, lambda rank: steps[rank])


def test_a_circle_of_receives_is_a_deadlock() -> None:
    steps = [
        [(Recv(1, unit(0), True),), (Send(1, unit(0)),)],
        [(Recv(0, unit(0)),), (Send(0, unit(0)),)],
    ]
    with pytest.raises(DeadlockError, match=r"rank 0 in step 0, .*rank 1 in step 0"):
        verify(ONE_UNIT, lambda rank: steps[rank])


def test_overwriting_what_a_peer_may_still_read_is_told_from_a_deadlock() -> None:
    """Two ranks swap a chunk in two steps: each overwrites what the other has yet to read."""
    spec = Spec("all_gather", 2, 1, (EVERYONE,), (frozenset(),) * 2)
    in_two_steps = [[(Send(1 - rank, unit(0)),), (Recv(1 - rank, unit(0)),)] for rank in range(2)]
    with pytest.raises(OverwriteError, match="rank 0, step 1, chunk 0: overwritten while rank 1 may still read"):
        verify(spec, lambda rank: in_two_steps[rank])
    # In one step the chunk is sent from a copy, and nothing is wrong with it.
    in_one_step = [[(Send(1 - rank, unit(0)), Recv(1 - rank, unit(0)))] for rank in range(2)]
    verify(spec, lambda rank: in_one_step[rank])


def test_a_doubled_contribution_names_whose() -> None:
    steps = [
        [(Send(1, unit(0)), Recv(1, unit(0), True)), (Send(1, unit(0)), Recv(1, unit(0), True))],
        [(Send(0, unit(0)), Recv(0, unit(0), True)), (Send(0, unit(0)), Recv(0, unit(0), True))],
    ]
    with pytest.raises(ScheduleError, match="the contribution of rank 0 to unit 0 is added twice"):
        verify(ONE_UNIT, lambda rank: steps[rank])


def test_a_unit_of_nobody_is_no_unit_that_a_rank_holds() -> None:
    spec = Spec("all_gather", 2, 2, (frozenset({0}), frozenset()), (frozenset({0}), frozenset({1})))
    with pytest.raises(ScheduleError, match=r"rank 1, step 0 \(the end\), unit 1: misses the contribution"):
        verify(spec, lambda rank: [])


@pytest.mark.parametrize(
    ("sources", "wants", "said"),
    [
        (
            (EVERYONE,) * 2,
            (frozenset({0}),) * 2,
            "1 units and 2 ranks names the sources of 2 units and what 2 ranks want",
        ),
        ((frozenset({2}),), (frozenset({0}),) * 2, r"source 2 is none of 0\.\.1"),
        ((EVERYONE,), (frozenset({-1}),) * 2, r"wanted unit -1 is none of 0\.\.0"),
    ],
)
def test_a_spec_of_other_ranks_or_units(
    sources: tuple[frozenset[int], ...], wants: tuple[frozenset[int], ...], said: str
) -> None:
    with pytest.raises(ScheduleError, match=said):
        verify(Spec("all_reduce", 2, 1, sources, wants), lambda rank: [])


def test_ranks_that_add_in_another_order_are_caught() -> None:
    """Three ranks that each hold the whole sum, associated differently: their bits would differ."""
    everyone = frozenset(range(3))
    spec = Spec("all_reduce", 3, 1, (everyone,), (frozenset({0}),) * 3)

    def pairwise(rank: int) -> list[Step]:
        left, right = (rank - 1) % 3, (rank + 1) % 3
        exchange: Step = (Send(left, unit(0)), Send(right, unit(0)))
        return [(*exchange, Recv(left, unit(0), True)), (Recv(right, unit(0), True),)]

    with pytest.raises(ScheduleError, match="added in another order than on rank 0"):
        verify(spec, pairwise)


def test_proves_which_algorithms_add_in_rank_order() -> None:
    ordered = {
        entry.name
        for entry in algorithms("all_reduce").values()
        if not entry.native and verify(spec_of(entry, entry.group(6)), entry.steps(entry.group(6))).rank_ordered
    }
    assert ordered == {"direct", "one_shot", "central"}


def test_proves_which_messages_may_be_put_in_place() -> None:
    """A replacing message is put-safe where its sender knows the receiver's copy is done with."""

    def puts(collective: str, name: str, size: int) -> tuple[int, int]:
        entry = lookup(collective, name)
        group = entry.group(size)
        steps = [entry.steps(group)(rank) for rank in range(size)]
        replacing = sum(isinstance(op, Recv) and not op.reduce for rank in steps for step in rank for op in step)
        return len(verify(spec_of(entry, group), entry.steps(group), puts=True).put_safe), replacing

    for name in ("ring", "torus", "direct", "tree", "halving_doubling"):
        safe, replacing = puts("all_reduce", name, 8)
        assert safe == replacing > 0, name
    assert puts("broadcast", "tree", 8) == (7, 7)  # nobody reads what the root is about to replace
    assert puts("all_gather", "ring", 8) == (56, 56)
    # Rank 1 still sends its own unit 0 on to rank 2 when rank 0 replaces it: nothing tells rank 0 that it has.
    steps: list[list[Step]] = [
        [(Send(1, unit(0)),)],
        [(Send(2, unit(0)),), (Recv(0, unit(0)),)],
        [(Recv(1, unit(0), True),)],
    ]
    spec = Spec("reduce", 3, 1, (frozenset(range(3)),), (frozenset(), frozenset(), frozenset()))
    assert (0, 0, 0) not in verify(spec, lambda rank: steps[rank], puts=True).put_safe


def test_two_messages_of_one_rank_in_one_fold_are_refused() -> None:
    spec = Spec("all_reduce", 3, 1, (frozenset(range(3)),), (frozenset({0}), frozenset(), frozenset()))
    chunk = unit(0)
    steps: list[list[Step]] = [
        [(Recv(1, chunk, True), Recv(1, chunk, True))],
        [(Send(0, chunk), Recv(2, chunk)), (Send(0, chunk),)],
        [(Send(1, chunk),)],
    ]
    with pytest.raises(ScheduleError, match=r"one fold takes two messages of one rank, of \[1, 1\]"):
        verify(spec, lambda rank: steps[rank])


def test_a_whole_value_whose_mean_nobody_would_divide_is_refused() -> None:
    """Rank 1 adds for rank 0 and keeps nothing: where a mean is divided, a rank must see in its own steps."""
    spec = Spec("reduce", 2, 1, (EVERYONE,), (frozenset({0}), frozenset()))
    steps: list[list[Step]] = [
        [(Send(1, unit(0)),), (Recv(1, unit(0)),)],
        [(Recv(0, unit(0), True),), (Send(0, unit(0)),)],
    ]
    with pytest.raises(ScheduleError, match="a mean would not have been divided"):
        verify(spec, lambda rank: steps[rank])


def test_a_fold_in_another_order_is_not_taken_for_one_in_rank_order() -> None:
    everyone = frozenset(range(3))
    spec = Spec("reduce", 3, 1, (everyone,), (frozenset({0}), frozenset(), frozenset()))
    # Ranks 1 and 2 swap what they hold, so that rank 0 folds 0, 2, 1.
    swap: list[Step] = [(Send(2, unit(0)), Recv(2, unit(0))), (Send(0, unit(0)),)]
    steps: list[list[Step]] = [
        [(Recv(1, unit(0), True), Recv(2, unit(0), True))],
        swap,
        [(Send(1, unit(0)), Recv(1, unit(0))), (Send(0, unit(0)),)],
    ]
    assert not verify(spec, lambda rank: steps[rank]).rank_ordered
