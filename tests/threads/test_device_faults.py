"""Faults on a device, and after them: nothing waits for ever, nothing is silent, and memory in use stays as it is."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch, CollectiveTimeout, PeerFailed, RingredError, TransportUnavailable
from ringred.runtime import on_device
from ringred.testing import run_ranks
from ringred.testing.fake_device import FakeDevice
from ringred.transports.base import Fault, FaultKind
from ringred.transports.cuda import plane
from ringred.transports.cuda.memory import DeviceMemory

CPU = torch.device("cpu")


def with_own_streams(body: Callable[[Communicator, Any], Any], size: int, **options: Any) -> list[Any]:
    """What `body` gives on ranks whose programs work on streams of their own."""

    def main(comm: Communicator) -> Any:
        comm.all_reduce(torch.ones(3))
        device: Any = comm.transport.queue.driver  # type: ignore[union-attr]
        device.current = device.stream()
        try:
            return body(comm, device.current)
        finally:
            device.current = None

    return run_ranks(main, size, "cuda_ipc:fake", return_exceptions=True, **options)


def test_a_call_that_is_enqueued_while_an_earlier_one_is_given_up_raises_and_holds_nobody() -> None:
    def body(comm: Communicator, stream: Any) -> str:
        comm.set_timeout(0.5)
        if comm.rank == 1:
            stream._queue.put(lambda: stuck.wait(20))
        comm.all_reduce(torch.ones(1000))
        if comm.rank == 1:
            stuck.wait(20)
            return ""
        post = comm.transport.isend

        def slowly(*arguments: Any) -> Any:
            request = post(*arguments)
            time.sleep(1.5)
            return request

        comm.transport.isend = slowly  # type: ignore[method-assign]
        try:
            with pytest.raises(RingredError) as raised:
                comm.all_reduce(torch.ones(1000))
            event, until = stream.record(), time.monotonic() + 5
            while not event.done():
                assert time.monotonic() < until, "the program's stream waits for ever"
                time.sleep(0.01)
        finally:
            stuck.set()
        return str(raised.value)

    stuck = threading.Event()
    assert "rank 0" in with_own_streams(body, 2, timeout=20)[0]


def test_the_last_failure_is_raised_by_close_if_no_call_has_told_of_it() -> None:
    def body(comm: Communicator, stream: Any) -> None:
        if comm.rank == 1:
            stream.stall(0.5)
        comm.all_reduce(torch.ones(1000))
        meeting.wait(5)
        if comm.rank == 2:
            comm.abort(ValueError("of its own"))
        time.sleep(1.0)
        comm.close()

    meeting = threading.Barrier(3)
    first, second, _ = with_own_streams(body, 3, timeout=10)
    for failure in (first, second):
        assert isinstance(failure, PeerFailed), failure
        assert "all_reduce #2" in str(failure)
        assert "of its own" in str(failure)


def test_to_synchronize_a_communicator_that_has_failed_raises() -> None:
    def body(comm: Communicator) -> str:
        comm.all_reduce(torch.ones(10))
        meeting.wait(5)
        if comm.rank == 0:
            comm.abort(ValueError("of its own"))
        meeting.wait(5)
        if comm.rank:  # it hears of it at its next call
            with pytest.raises(PeerFailed):
                comm.all_reduce(torch.ones(10))
        with pytest.raises(PeerFailed) as raised:
            comm.synchronize()
        return str(raised.value)

    meeting = threading.Barrier(2)
    assert all("of its own" in text for text in run_ranks(body, 2, "cuda_ipc:fake"))


def test_a_mismatch_on_the_host_ends_the_device_too() -> None:
    def body(comm: Communicator) -> str:
        there = comm.on_device(FakeDevice, CPU)
        with pytest.raises(CollectiveMismatch):
            comm.all_reduce(torch.ones(3 + comm.rank))
        with pytest.raises(PeerFailed) as raised:
            there.all_reduce(torch.ones(3))
        return str(raised.value)

    assert all("did not make the same call" in text for text in run_ranks(body, 2, "shm"))


def test_to_close_takes_no_longer_for_many_calls_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane, "_DRAINING", 1.0)
    monkeypatch.setattr(on_device, "_DRAINING", 1.2)

    def body(comm: Communicator, stream: Any) -> float:
        comm.set_timeout(0.3)
        stream._queue.put(lambda: over.wait(30))
        works = [comm.all_reduce(torch.ones(100), async_op=True) for _ in range(5)]
        while works[-1].exception() is None:
            time.sleep(0.05)
        began = time.monotonic()
        with pytest.raises(RingredError):
            works[0].wait()
        comm.close()
        seconds = time.monotonic() - began
        meeting.wait(20)
        over.set()
        return seconds

    over, meeting = threading.Event(), threading.Barrier(2)
    for seconds in with_own_streams(body, 2):
        assert isinstance(seconds, float), seconds
        assert seconds < 5


def test_memory_is_not_given_to_another_stream_before_the_first_is_done_with_it() -> None:
    def body(comm: Communicator, first: Any) -> float:
        device: Any = comm.transport.queue.driver  # type: ignore[union-attr]
        second = device.stream()
        kept, ones, twos = torch.zeros(1000), torch.ones(1000), torch.full((1000,), 2.0)
        window = comm.empty(1000)
        place = window.data_ptr()
        first.copy(place, ones.data_ptr(), 4000)
        first.stall(0.5)
        first.copy(kept.data_ptr(), place, 4000)  # reads the window later
        del window
        gc.collect()
        device.current = second
        other = comm.empty(1000)
        for _ in range(20):
            if other.data_ptr() == place:
                break
            time.sleep(0.05)
            other = comm.empty(1000)
        assert other.data_ptr() == place, "it is used again in the end"
        second.copy(place, twos.data_ptr(), 4000)
        second.record().wait()
        first.record().wait()
        return kept[0].item()

    assert with_own_streams(body, 2) == [1.0] * 2


@pytest.mark.parametrize("transport", ["local", "shm"])
def test_a_device_that_was_refused_may_be_asked_for_again(transport: str) -> None:
    def body(comm: Communicator) -> list[float]:
        found = []
        for turn in range(4):

            def make(turn: int = turn) -> FakeDevice:
                if turn < 2 and comm.rank == turn:
                    raise RuntimeError("not yet")
                return FakeDevice()

            if turn < 2:
                with pytest.raises(TransportUnavailable, match="not yet" if comm.rank == turn else "cannot"):
                    comm.on_device(make, CPU)
                continue
            there = comm.on_device(make, CPU)
            tensor = torch.ones(1000)
            there.all_reduce(tensor)
            found.append(tensor[0].item())
            there.close()
        assert len(comm._sides) <= 1, "those that were closed are forgotten"
        return found

    assert run_ranks(body, 2, transport, timeout=10) == [[2.0, 2.0]] * 2


def test_memory_that_peers_cannot_open_goes_by_the_host() -> None:
    def body(comm: Communicator) -> tuple[str, float]:
        there = comm.on_device(lambda: FakeDevice(refuses_peers=comm.rank == 1), CPU)
        tensor = torch.full((5000,), comm.rank + 1.0)
        there.all_reduce(tensor)
        return there.transport.name, tensor[-1].item()

    assert run_ranks(body, 3, "shm") == [("shm", 6.0)] * 3


@pytest.mark.parametrize("gone", [{}, {1: "its process ended"}])
def test_memory_of_a_peer_that_has_ended_is_no_failure_of_the_device(gone: dict[int, str]) -> None:
    """A rank that was killed between the handle and its use: the handle does not open, and the rank is at fault."""

    class Refusing:
        def open(self, handle: bytes, nbytes: int) -> int:
            raise RuntimeError("invalid handle")

    there = DeviceMemory.__new__(DeviceMemory)
    there.driver, there._opened = Refusing(), {}  # type: ignore[assignment]
    there._neighbours = SimpleNamespace(gone=gone, has_gone=lambda peer, patience: peer in gone)  # type: ignore[assignment]
    there._entry = lambda member, number: (8, b"")  # type: ignore[method-assign]
    behind = plane.DevicePlane.__new__(plane.DevicePlane)
    behind._memory, behind._members = there, {2: 1}
    link = SimpleNamespace(rank=2)
    if gone:
        with pytest.raises(Fault) as fault:
            behind._there(link, 0)  # type: ignore[arg-type]
        assert (fault.value.kind, fault.value.peer, fault.value.detail) == (FaultKind.PEER, 2, "its process ended")
    else:
        with pytest.raises(RuntimeError, match="invalid handle"):
            behind._there(link, 0)  # type: ignore[arg-type]


def test_a_device_that_stands_still_is_named_and_no_innocent_rank() -> None:
    def body(comm: Communicator, stream: Any) -> None:
        comm.set_timeout(0.4)
        if comm.rank == 1:
            stream.stall(1.5)
            comm.all_reduce(torch.ones(100))
            comm.synchronize()
        else:
            comm.set_timeout(10)
            comm.all_reduce(torch.ones(100))
            comm.synchronize()

    for failure in with_own_streams(body, 2, timeout=10):
        assert isinstance(failure, (CollectiveTimeout, PeerFailed)), failure
        assert "the device of rank 1 was not done" in str(failure) or "rank 1" in str(failure)
        assert "rank 0 did not take part" not in str(failure)


def test_a_timeout_counts_between_hosts_too() -> None:
    def body(comm: Communicator) -> float:
        comm.all_reduce(torch.ones(3))
        comm.set_timeout(0.4)
        device: Any = comm.transport.queue.driver  # type: ignore[union-attr]
        device.current = stream = device.stream()
        stream.stall(2.0 if comm.rank == 1 else 0.0)
        began = time.monotonic()
        try:
            comm.all_reduce(torch.ones(3_000_000))
            comm.synchronize()
        except RingredError:
            pass
        else:
            raise AssertionError("nobody noticed")
        device.current = None
        return time.monotonic() - began

    assert max(run_ranks(body, 2, "staged:fake", timeout=20)) < 1.5


def test_a_device_that_breaks_is_told_with_rank_call_and_place() -> None:
    def breaks() -> None:
        raise ValueError("illegal memory access")

    def body(comm: Communicator) -> None:
        comm.all_reduce(torch.ones(10))
        if comm.rank == 1:
            comm.transport.queue.stream._queue.put(breaks)  # type: ignore[union-attr]
        comm.all_reduce(torch.ones(1000))
        comm.synchronize()

    for transport in ("cuda_ipc:fake", "staged:fake"):
        others = run_ranks(body, 3, transport, return_exceptions=True, timeout=10)
        culprit = others.pop(1)
        assert isinstance(culprit, RingredError)
        assert "rank 1: all_reduce #2" in str(culprit)
        assert "its device failed" in str(culprit)
        assert "illegal memory access" in str(culprit)
        assert all(isinstance(other, PeerFailed) and "illegal memory access" in str(other) for other in others), others
