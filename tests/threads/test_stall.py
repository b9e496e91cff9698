"""A collective that takes long says who is missing and what that rank does, once, while there is still time."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from ringred.communicator import Communicator
from ringred.runtime import stall, status
from ringred.testing import run_ranks
from ringred.transports.membership.caller import Connection
from ringred.transports.membership.card import Card
from ringred.transports.membership.view import View

TRANSPORTS = pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "torch_p2p"])


def load_batch(seconds: float) -> None:
    time.sleep(seconds)


@TRANSPORTS
def test_the_missing_rank_is_named_and_what_it_does(transport: str, capfd: pytest.CaptureFixture[str]) -> None:
    def body(comm: Communicator) -> int:
        comm.barrier()
        comm.all_reduce(torch.ones(7))
        if comm.rank == 2:
            load_batch(1.5)
        comm.all_reduce(torch.ones(9))
        return comm.stalls

    assert run_ranks(body, 4, transport, stall_seconds=0.5) == [1, 0, 0, 0]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ringred: rank")]
    assert len(lines) == 1, lines
    assert "rank 0 has waited" in lines[0]
    assert "in all_reduce #3 (sum, float32, 9 elements" in lines[0]
    assert "test_stall.py" in lines[0].partition(";")[0]
    assert "; rank 2 is missing: its last collective was all_reduce #2 (sum, float32, 7 elements" in lines[0]
    assert "in load_batch (process" in lines[0]


def test_a_short_wait_is_not_told(capfd: pytest.CaptureFixture[str]) -> None:
    def body(comm: Communicator) -> None:
        for _ in range(10):
            if comm.rank == 1:
                time.sleep(0.1)
            comm.barrier()

    run_ranks(body, 2, "shm", stall_seconds=0.5)
    assert "has waited" not in capfd.readouterr().err


def test_waits_in_a_part_of_the_ranks_name_its_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    def body(comm: Communicator) -> None:
        part = comm.split(comm.rank % 2)
        assert part is not None
        if comm.rank == 3:
            load_batch(1.3)
        part.barrier()

    run_ranks(body, 4, "shm", stall_seconds=0.5)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ringred: rank")]
    assert len(lines) == 1
    assert "; rank 1 is missing: it has called no collective yet" in lines[0], "ranks as the part counts them"


def test_a_rank_in_another_call_is_named_with_it() -> None:
    """Two parts wait for each other: each says what the other one is in."""

    asked = threading.Barrier(2)

    def body(comm: Communicator) -> str | None:
        other = comm.duplicate()
        if comm.rank == 0:
            waiting = comm.all_reduce(torch.ones(3), async_op=True)
        else:
            waiting = other.all_reduce(torch.ones(4), async_op=True)
        time.sleep(0.4)
        assert comm.seat is not None
        call = comm.runner.doings.seen()[0]
        told = status.ask_all(comm.seat.member, comm.seat.view)
        line = stall.verdict(comm, call, told)
        assert stall.verdict(comm, object(), told) is None, "a call that is over"
        asked.wait(10)
        (comm if comm.rank else other).all_reduce(torch.ones(3 if comm.rank else 4))
        waiting.wait()
        return line

    first, second = run_ranks(body, 2, "shm", stall_seconds=0.0)
    assert second is None, "it is in no call of that communicator"
    assert first is not None
    assert "rank 1 is missing: its last collective was" in first or "it has called no collective yet" in first


def test_anybody_of_this_user_may_ask_what_a_rank_does_and_no_more() -> None:
    def body(comm: Communicator) -> None:
        comm.barrier()
        comm.note("step", 12)
        assert comm.seat is not None
        connection = Connection(comm.seat.member.card.name, None, 5.0)
        told = connection.ask({"do": "describe"}, 5.0)
        assert told["step"] == 12
        assert told["calls"][0]["rank"] == comm.rank
        assert any("test_stall.py" in place for place in told["stack"])
        everyone = connection.ask({"do": "everyone"}, 5.0)
        assert [one["calls"][0]["rank"] for one in everyone["ranks"]] == [0, 1, 2]
        for message in ({"do": "join", "lineage": "world"}, {"do": "board", "board": "x"}, {"do": "come"}):
            with pytest.raises(ConnectionError, match="that is for processes of the job"):
                connection.ask(message, 5.0)
        connection.close()
        comm.barrier()

    run_ranks(body, 3, "shm")


def test_asking_goes_on_while_the_program_holds_all_locks_it_has() -> None:
    held = threading.Event()

    def body(comm: Communicator) -> None:
        comm.barrier()
        if comm.rank == 1:
            with comm.runner.order:
                held.set()
                time.sleep(0.5)
        else:
            assert held.wait(5)
            assert comm.seat is not None
            began = time.monotonic()
            told = status.ask_all(comm.seat.member, comm.seat.view)
            assert time.monotonic() - began < 0.4
            assert "silent" not in told[1]
        comm.barrier()

    run_ranks(body, 2, "shm")


def test_a_rank_whose_host_named_no_address_cannot_be_asked() -> None:
    def body(comm: Communicator) -> str:
        assert comm.seat is not None
        elsewhere = Card("another", 7, "another place", "its name")
        view = View.first("world", (*comm.seat.view.members, elsewhere))
        return str(status.ask_all(comm.seat.member, view)[2]["silent"])

    unreached = "it cannot be asked: it listens on its own host only (RINGRED_INTERFACE names an address for others)"
    assert run_ranks(body, 2, "shm") == [unreached] * 2


def test_a_communicator_that_is_closed_twice_takes_no_seat_but_its_own() -> None:
    def body(comm: Communicator) -> list[bool]:
        part = comm.subset(range(comm.size), "part")
        for _ in range(3):
            part.close()
        comm.barrier()
        assert comm.seat is not None
        told = status.ask_all(comm.seat.member, comm.seat.view)
        comm.barrier()
        return ["silent" in one for one in told]

    assert run_ranks(body, 2, "shm") == [[False, False]] * 2


def test_ranks_are_asked_when_no_thread_can_be_started_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(status.ThreadPoolExecutor, "submit", refused)

    def body(comm: Communicator) -> list[bool]:
        assert comm.seat is not None
        told = status.ask_all(comm.seat.member, comm.seat.view)
        comm.barrier()
        return ["silent" in one for one in told]

    assert run_ranks(body, 2, "shm") == [[False, False]] * 2
