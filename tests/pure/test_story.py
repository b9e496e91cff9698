"""A schedule as a story, and the page that shows it."""

from __future__ import annotations

import json

import pytest

from ringred.collectives.registry import COLLECTIVES, algorithms, groups, lookup, prove, spec_of
from ringred.runtime.select import predict, share_bounds
from ringred.schedule.story import Story, tell
from ringred.testing.command.animation import page, story_of
from ringred.topology.model import flat

SCHEDULED = [
    (collective, name)
    for collective in COLLECTIVES
    for name, entry in algorithms(collective).items()
    if not entry.native
]
NBYTES = 1 << 20


def story(collective: str, name: str, size: int, grid: tuple[int, ...] | None = None, segments: int = 1) -> Story:
    entry = lookup(collective, name)
    group, model = entry.group(size, 0, grid, segments), flat(size, 1e-5, 1e-9, 1e-10)
    bounds = share_bounds(NBYTES, entry.units(group))
    return tell(spec_of(entry, group), entry.steps(group), bounds, model.link, model.gamma)


@pytest.mark.parametrize(("collective", "name"), SCHEDULED)
def test_replayed_it_ends_where_the_proof_does(collective: str, name: str) -> None:
    entry = lookup(collective, name)
    for size in (1, 2, 5, 8, 12):
        for group in groups(entry, size):
            spec, model = spec_of(entry, group), flat(size, 1e-5, 1e-9, 1e-10)
            bounds = share_bounds(NBYTES, spec.units)
            told = tell(spec, entry.steps(group), bounds, model.link, model.gamma)
            held = [[1 << rank if rank in ranks else 0 for ranks in spec.sources] for rank in range(size)]
            for one in sorted(told.transfers, key=lambda one: one.taken):
                for u, mask in zip(one.chunk.units, one.carried, strict=True):
                    held[one.receiver][u] = held[one.receiver][u] | mask if one.reduce else mask
            whole = [sum(1 << rank for rank in ranks) for ranks in spec.sources]
            for rank, wanted in enumerate(spec.wants):
                assert [held[rank][u] for u in sorted(wanted)] == [whole[u] for u in sorted(wanted)]
            assert len(told.transfers) == sum(prove(entry, group).messages)
            assert told.cost == predict(entry, group, NBYTES, model)
            assert max((one.end for one in told.transfers), default=0.0) <= told.cost.seconds * (1 + 1e-12)


@pytest.mark.parametrize(
    ("name", "size", "grid", "rounds"),
    [
        ("ring", 8, None, 14),
        ("torus", 12, (4, 3), 10),
        ("halving_doubling", 8, None, 6),
        ("direct", 8, None, 2),
        ("one_shot", 8, None, 1),
        ("tree", 8, None, 6),
        ("central", 8, None, 2),
    ],
)
def test_rounds_are_those_of_the_textbook(name: str, size: int, grid: tuple[int, ...] | None, rounds: int) -> None:
    assert story("all_reduce", name, size, grid).rounds == rounds


def test_each_segment_more_takes_a_double_tree_the_three_messages_of_an_inner_rank() -> None:
    rounds = [story("all_reduce", "double_tree", 12, segments=segments).rounds for segments in (1, 2, 3, 8)]
    assert rounds == [6, 9, 12, 27]


def test_a_message_leaves_in_a_round_of_its_own_step_and_is_taken_then_or_later() -> None:
    told = story("all_reduce", "double_tree", 12, segments=4)
    sent: dict[int, set[int]] = {}
    for one in told.transfers:
        assert 0 <= one.round <= one.taken < told.rounds
        sent.setdefault(one.sender, set()).add(one.round)
    assert all(0 in sent[rank] for rank in (0, 2, 4)), "leaves of a tree begin at once"
    assert sum(one.taken > one.round for one in told.transfers) == 16


def test_the_page_holds_all_it_shows_and_loads_nothing() -> None:
    entry = lookup("all_reduce", "ring")
    group = entry.group(4)
    text = page(entry, group, 4096, flat(4, 1e-5, 1e-9, 1e-10))
    data = text.split('<script type="application/json" id="story">')[1].split("</script>")[0]
    shown = json.loads(data)
    assert shown == json.loads(json.dumps(story_of(entry, group, 4096, flat(4, 1e-5, 1e-9, 1e-10))))
    assert (shown["size"], shown["rounds"], len(shown["transfers"])) == (4, 6, 24)
    assert "def all_reduce(rank: int, group: Group)" in shown["source"]
    assert "{{" not in text.replace(data, "")
    for loads in ("http://", "https://", " src=", "@import", "fetch(", "<link"):
        assert loads not in text.replace(data, ""), loads


def test_what_is_too_much_for_a_page_is_refused() -> None:
    entry = lookup("all_reduce", "direct")
    with pytest.raises(ValueError, match=r"on 128 ranks sends 32512 messages, of which a page shows at most 10000"):
        page(entry, entry.group(128), 1 << 20, flat(128, 1e-5, 1e-9, 1e-10))
