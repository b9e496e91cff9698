"""Tapes: what is written into them, and whom their players understand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ringred import native
from ringred.communicator import Communicator
from ringred.runtime import tape
from ringred.testing import run_ranks

pytestmark = pytest.mark.skipif(native.player is None, reason=f"no compiled player: {native.reason}")


@pytest.mark.parametrize("by_python", [[0], [1], [0, 1], []])
def test_a_rank_that_plays_and_one_that_does_not_understand_each_other(by_python: list[int]) -> None:
    """Longer messages than the slots take at once, from both sides, and slots that either left anywhere."""

    def body(comm: Communicator) -> bool:
        player: Any = comm.transport.player
        share, right = (3 << 17) + 5, True
        for turn in range(8):
            ready = turn % 3 == 0 or comm.rank not in by_python
            player.ready = lambda ready=ready: ready
            sent = torch.arange(2 * share, dtype=torch.float32) + turn + comm.rank
            got, gathered = torch.empty(2 * share), torch.empty(2 * share)
            for call in (
                lambda got=got, sent=sent: comm.all_to_all(got, sent),
                lambda gathered=gathered, sent=sent: comm.all_gather(gathered, sent[:share]),
                lambda sent=sent: comm.all_reduce(sent),
            ):
                comm.runner.recall.armed &= ready  # or it would be played without being asked whether it may
                call()
            expected = torch.arange(share, dtype=torch.float32) + comm.rank * share + turn
            right &= torch.equal(got, torch.cat([expected, expected + 1]))
            first = torch.arange(share, dtype=torch.float32) + turn
            right &= torch.equal(gathered, torch.cat([first, first + 1]))
            right &= torch.equal(sent, 2 * (torch.arange(2 * share, dtype=torch.float32) + turn) + 1)
        return right

    assert run_ranks(body, 2, "shm") == [True] * 2


def test_what_no_cache_keeps_is_right_wherever_it_lies() -> None:
    def body(comm: Communicator) -> bool:
        elements, right = (33 << 18) + 7, True
        for offset in (0, 1, 3):
            base = torch.arange(elements, dtype=torch.float32)
            tensor = torch.empty(elements + offset)[offset:]
            tensor.copy_(base + comm.rank)
            comm.broadcast(tensor, 1)
            right &= torch.equal(tensor, base + 1)
            found = torch.empty(2 * elements + offset)[offset:]
            comm.all_to_all(found, torch.cat([base, base + 1]))
            right &= torch.equal(found, torch.cat([base + comm.rank] * 2))
        return right

    assert run_ranks(body, 2, "shm") == [True] * 2


def test_copies_go_past_the_cache_where_nothing_reads_them_again() -> None:
    large, other, small = torch.empty(9 << 20), torch.empty(2 << 20), torch.empty(1 << 10)
    send, receive, fold, take, _, copy = range(6)
    kept = (receive, 0, 1, large, False)
    plans: list[tuple[list[tuple[Any, ...]], set[int]]] = [
        ([kept, (take, 0, 0, 1)], {0}),
        ([kept, (take, 0, 0, 1), (send, 1, 1, large[5:9], False, False)], set()),
        ([(send, 1, 1, large, False, False), kept, (take, 0, 0, 1)], {1}),
        ([kept, (take, 0, 0, 1), (copy, other, large[: 2 << 20])], {2}),
        ([(receive, 0, 1, other, True), (fold, (0,), other, 0, True, 0, (1,)), kept, (take, 0, 0, 1)], set()),
        ([(fold, (), other, 0, True, 0, ()), (copy, large[: 2 << 20], other)], {1}),
        ([(copy, other, large[: 2 << 20]), (send, 0, 1, other, False, False)], set()),
        ([(copy, small, large[: 1 << 10]), (receive, 0, 1, other, False), (take, 0, 0, 1)], set()),
    ]
    for plan, expected in plans:
        assert tape.past(plan) == expected, plan
