"""From reports to the one exception that says what went wrong."""

from __future__ import annotations

from ringred.errors import CollectiveMismatch, CollectiveTimeout, PeerFailed
from ringred.runtime.failures import RAISED, Report, diagnose

CALL, OTHER = "all_reduce #17 (sum, float32, 10 elements, ring)", "broadcast #17 (float32, 10 elements, root 0, tree)"


def report(
    rank: int, kind: str, peer: int, call: str = CALL, detail: str = "", waited: float = 30.4, number: int = 17
) -> Report:
    return Report(rank, kind, peer, number, call, f"train.py:{rank}", waited, 30.0, detail)


def test_a_report_survives_the_journey_and_nonsense_is_none() -> None:
    mine = report(1, "timeout", 2, detail="ä\n")
    assert Report.load(mine.dump()) == mine
    assert [Report.load(text) for text in ("", "{}", "[1]", '{"rank": "x"}')] == [None] * 4


def test_a_rank_that_raised_is_named_with_what_it_raised() -> None:
    raised = report(2, RAISED, -1, detail="ValueError: boom")
    error = diagnose(report(0, "aborted", 2), {2: raised}, 3)
    assert isinstance(error, PeerFailed)
    assert str(error) == f"rank 0: {CALL} at train.py:0 given up: rank 2 raised ValueError: boom"


def test_different_calls_are_listed_with_ranks_and_sites() -> None:
    error = diagnose(report(0, "mismatch", 1), {1: report(1, "aborted", 0, OTHER), 2: report(2, "aborted", 0)}, 3)
    assert isinstance(error, CollectiveMismatch)
    assert "ranks 0, 2 all_reduce #17" in str(error)
    assert "rank 1 broadcast #17" in str(error)
    assert "train.py:1" in str(error)


def test_two_waits_that_timed_out_in_different_calls_are_a_mismatch() -> None:
    error = diagnose(report(0, "timeout", 1), {1: report(1, "timeout", 0, OTHER)}, 2)
    assert isinstance(error, CollectiveMismatch)


def test_who_is_missing() -> None:
    error = diagnose(report(0, "timeout", 3), {1: report(1, "aborted", 0), 3: report(3, "timeout", 2)}, 4)
    assert isinstance(error, CollectiveTimeout)
    assert isinstance(error, TimeoutError)
    assert "rank 2 did not take part within the timeout of 30 s" in str(error)


def test_a_mismatch_whose_other_side_is_silent_still_names_it() -> None:
    error = diagnose(report(0, "mismatch", 1, detail="expected 4 bytes, got 8"), {}, 2)
    assert isinstance(error, CollectiveMismatch)
    assert "rank 0 got from rank 1 what it did not expect: expected 4 bytes, got 8" in str(error)


def test_a_length_that_differs_is_told_from_ranks_that_are_ahead() -> None:
    """A gather whose root was sent too much, by a rank that has gone on like all others."""
    barrier = "barrier #18 (max, uint8, 1 element, tree)"
    reports = {rank: report(rank, "aborted", 0, barrier, number=18) for rank in (1, 2)}
    error = diagnose(report(0, "mismatch", 2, detail="expected 32 bytes, got 36"), reports, 3)
    assert isinstance(error, CollectiveMismatch)
    assert "rank 0 all_reduce #17" in str(error)
    assert "rank 2 is past it, in barrier #18" in str(error)
    assert "rank 0 got from rank 2 what it did not expect: expected 32 bytes, got 36" in str(error)


def test_who_is_late_is_not_confused_with_who_is_ahead() -> None:
    late = diagnose(report(0, "timeout", 1), {2: report(2, "timeout", 1, "barrier #18 ()", number=18)}, 3)
    assert isinstance(late, CollectiveTimeout)
    assert "rank 1 did not take part" in str(late)
    skipped = diagnose(report(0, "timeout", 1), {1: report(1, "timeout", 0, "barrier #18 ()", number=18)}, 2)
    assert isinstance(skipped, CollectiveMismatch)
    assert "rank 1 is past it, in barrier #18" in str(skipped)
    died = diagnose(report(0, "peer", 1, detail="closed"), {2: report(2, "peer", 1, "barrier #18 ()", number=18)}, 3)
    assert isinstance(died, PeerFailed)
    assert "rank 1 is gone" in str(died)


def test_the_dead_are_those_that_are_gone_and_left_no_report() -> None:
    reports = {1: report(1, "peer", 2, detail="its connection closed"), 0: report(0, "peer", 1)}
    error = diagnose(reports[0], reports, 3)
    assert isinstance(error, PeerFailed)
    assert isinstance(error, ConnectionError)
    assert "rank 2 is gone (its connection closed)" in str(error)
