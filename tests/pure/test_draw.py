"""The drawing of a schedule."""

from __future__ import annotations

from ringred.collectives.registry import lookup
from ringred.schedule.draw import LEGEND, draw


def test_the_ring_of_two() -> None:
    entry = lookup("all_reduce", "ring")
    assert draw(2, entry.steps(entry.group(2))).splitlines() == [
        "rank  step 0   step 1",
        "----  -------  -------",
        "0     1→1 0+1  0→1 1=1",
        "1     0→0 1+0  1→0 0=0",
        LEGEND,
    ]


def test_what_is_left_out_is_counted_and_what_is_wrong_is_marked() -> None:
    entry = lookup("all_reduce", "ring")
    drawn = draw(20, entry.steps(entry.group(20)), max_ranks=3, max_steps=2, mark=(1, 1))
    assert "... and 36 more steps and 17 more ranks" in drawn
    assert ">> 19→2 18+0 <<" in drawn
    assert len(drawn.splitlines()) == 7


def test_many_peers_are_shortened() -> None:
    entry = lookup("all_reduce", "one_shot")
    assert "0→1,2…7 0+1,2…7" in draw(8, entry.steps(entry.group(8)))
