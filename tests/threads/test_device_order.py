"""Calls on a device that return before it is done: what comes before and after them, and faults that come later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ringred.communicator import Communicator
from ringred.data_parallel.clock import Clock
from ringred.data_parallel.lane import Lane
from ringred.data_parallel.reductions import Nothing
from ringred.errors import CollectiveTimeout, PeerFailed, RingredError
from ringred.runtime.config import Config
from ringred.testing import run_ranks
from ringred.testing.fake_device import FakeDevice

_PAUSE = 0.3  # seconds for which a stream stands still


@contextmanager
def own_stream(comm: Communicator) -> Iterator[Any]:
    """The program's own stream, on which it works while `comm` reduces."""
    device: Any = comm.transport.queue.driver  # type: ignore[union-attr]
    device.current = stream = device.stream()
    try:
        yield stream
    finally:
        device.current = None
        stream.close()


def on_a_slow_stream(body: Callable[[Communicator, Any], Any]) -> list[Any]:
    """What `body` gives on three ranks; rank 1's own stream stands still at first."""

    def main(comm: Communicator) -> Any:
        comm.all_reduce(torch.ones(3))
        with own_stream(comm) as stream:
            if comm.rank == 1:
                stream.stall(_PAUSE)
            return body(comm, stream)

    return run_ranks(main, 3, "cuda_ipc:fake", timeout=10)


def test_calls_return_before_the_device_is_done_and_order_the_stream() -> None:
    def body(comm: Communicator, stream: Any) -> tuple[float, float, bool]:
        tensor, copy = torch.full((1000,), comm.rank + 1.0), torch.zeros(1000)
        began = time.monotonic()
        for _ in range(3):
            comm.all_reduce(tensor)
        stream.copy(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        enqueued = time.monotonic() - began
        stream.record().wait()
        return enqueued, time.monotonic() - began, bool(copy.eq(54).all())

    for enqueued, done, right in on_a_slow_stream(body):
        assert enqueued < _PAUSE / 2
        assert done > _PAUSE / 2
        assert right


def test_work_is_done_when_the_device_is() -> None:
    def body(comm: Communicator, stream: Any) -> bool:
        tensor = torch.full((1000,), comm.rank + 1.0)
        work = comm.all_reduce(tensor, async_op=True)
        work.wait()
        early = work.is_completed()
        stream.record().wait()
        until = time.monotonic() + 2
        while not work.is_completed() and time.monotonic() < until:
            time.sleep(0.01)
        assert work.is_completed()
        assert work.ended_ns > work.started_ns
        assert tensor.eq(6).all()
        return early

    assert on_a_slow_stream(body) == [False] * 3


def test_the_host_waits_where_it_is_told_to() -> None:
    def body(comm: Communicator) -> float:
        there = Communicator(comm.transport, config=Config(timeout=10, blocking=True), name="blocking")
        with own_stream(there) as stream:
            stream.stall(_PAUSE if comm.rank == 1 else 0.0)
            began = time.monotonic()
            tensor = torch.ones(1000)
            there.all_reduce(tensor)
            assert tensor.eq(3).all()
            return time.monotonic() - began

    assert min(run_ranks(body, 3, "cuda_ipc:fake")) > _PAUSE / 2


def test_a_fault_after_the_host_has_gone_on_is_raised_by_the_next_call() -> None:
    """Rank 2 is told to fail once all have enqueued a call that rank 1's stream holds up."""

    def body(comm: Communicator) -> tuple[float, str]:
        comm.all_reduce(torch.ones(3))
        with own_stream(comm) as stream:
            if comm.rank == 1:
                stream.stall(1.5)
            work = comm.all_reduce(torch.ones(1000), async_op=True)
            work.wait()
            meeting.wait(5)
            if comm.rank == 2:
                comm.abort(ValueError("of its own"))
                return 0.0, ""
            began = time.monotonic()
            while work.exception() is None and time.monotonic() < began + 5:
                time.sleep(0.005)
            seconds = time.monotonic() - began
            with pytest.raises(PeerFailed, match="of its own"):
                work.wait()
            with pytest.raises(PeerFailed, match="unusable since an earlier failure"):
                comm.all_reduce(torch.ones(3))
            return seconds, str(work.exception())

    meeting = threading.Barrier(3)
    first, second, _ = run_ranks(body, 3, "cuda_ipc:fake", timeout=10)
    assert first[0] < 1
    assert second[0] < 3  # its own stream stood still
    assert "all_reduce #2" in first[1]


def test_a_stream_that_stands_still_is_noticed_after_the_host_has_gone_on() -> None:
    def body(comm: Communicator) -> None:
        comm.set_timeout(0.5)
        with own_stream(comm) as stream:
            if comm.rank == 1:
                stream.stall(1.5)
            work = comm.all_reduce(torch.ones(1000), async_op=True)
            work.wait()
            while work.exception() is None:
                time.sleep(0.01)
            work.wait()

    for failure in run_ranks(body, 3, "cuda_ipc:fake", return_exceptions=True):
        assert isinstance(failure, (CollectiveTimeout, PeerFailed)), failure


def test_a_child_that_is_closed_finishes_what_is_enqueued() -> None:
    def body(comm: Communicator, stream: Any) -> bool:
        child = comm.duplicate()
        tensor = torch.full((1000,), comm.rank + 1.0)
        child.all_reduce(tensor)
        child.close()
        return bool(tensor.eq(6).all())

    assert on_a_slow_stream(body) == [True] * 3


def test_jobs_of_a_lane_come_after_the_program_and_before_what_it_does_next() -> None:
    def body(comm: Communicator) -> float:
        there = comm.on_device(FakeDevice, torch.device("cpu"))
        lane = Lane(there, "test")
        device: Any = lane.comm.transport.queue.driver  # type: ignore[union-attr]
        device.current = stream = device.stream()
        tensor, late, copy = torch.zeros(1000), torch.full((1000,), comm.rank + 1.0), torch.zeros(1000)
        stream.stall(_PAUSE if comm.rank else 0.0)
        stream.copy(tensor.data_ptr(), late.data_ptr(), tensor.nbytes)

        def job(inner: Communicator) -> torch.Tensor:
            inner.all_reduce(tensor)
            inner.all_reduce(tensor)
            return tensor

        lane.submit(job, "a test").wait()
        stream.copy(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        stream.record().wait()
        device.current = None
        stream.close()
        return copy[0].item()

    assert run_ranks(body, 3, "shm") == [18.0] * 3


def test_a_second_purpose_is_seen_on_a_device_too() -> None:
    def body(comm: Communicator) -> str:
        there = comm.on_device(FakeDevice, torch.device("cpu"))
        with comm.for_purpose(f"purpose {comm.rank}"), pytest.raises(RingredError) as raised:
            there.all_reduce(torch.ones(3))
        return str(raised.value)

    assert all("for purpose" in text for text in run_ranks(body, 2, "shm"))


class _Done:
    """Work of a device that ended at known times."""

    started_ns = ended_ns = 1

    def __init__(self, ready: Any, began: Any, point: Any) -> None:
        self.rest = self
        self.ready, self.began, self.point = ready, began, point

    def finished(self) -> None:
        pass

    def wait(self) -> None:
        pass


def test_times_of_a_backward_are_the_devices() -> None:
    stream = FakeDevice().stream()
    clock = Clock(stream.record)

    def after(seconds: float) -> Any:
        stream.stall(seconds)
        return stream.record()

    clock.forward_ended()
    ready = after(0.05)
    now = time.monotonic_ns()
    works = [_Done(ready, after(0.0), after(0.1))]
    for _ in range(2):
        clock.note(clock.ended(), [now - 5, 0], [now], works, ([8], [2], ["ring"]))
    last = clock.last
    assert last is not None
    assert last.full_ns[0] - last.began_ns == pytest.approx(50e6, rel=0.5)
    assert last.ready_ns == [last.full_ns[0], 0]
    assert last.done_ns[0] - last.started_ns[0] == pytest.approx(100e6, rel=0.5)
    assert last.ended_ns >= last.done_ns[0]
    stream.close()


def test_times_of_backwards_that_the_host_is_ahead_of_are_read_in_the_end() -> None:
    """With a bucket that is skipped, whose times nobody notes."""
    stream = FakeDevice().stream()
    clock = Clock(stream.record)
    for _ in range(5):
        clock.forward_ended()
        stream.stall(0.02)
        ready = stream.record()
        works = [_Done(ready, stream.record(), stream.record()), Nothing()]
        now = time.monotonic_ns()
        clock.note(clock.ended(), [now], [now, now], works, ([8, 8], [1, 1], ["ring", "skipped"]))
    last = clock.last
    assert last is not None
    assert all(0 <= done - last.began_ns < 1e9 for done in last.done_ns)
    assert len(clock.arrivals) == 4
    assert all(0.015 < seconds < 0.2 for seconds in clock.arrivals)
    stream.close()


def test_the_watch_looks_closely_only_while_somebody_waits() -> None:
    def body(comm: Communicator) -> tuple[bool, bool, bool]:
        hurry = comm.runner.device._hurry
        idle = hurry.is_set()
        with own_stream(comm) as stream:
            stream.stall(_PAUSE)
            work = comm.all_reduce(torch.ones(1000), async_op=True)
            assert work is not None
            while not work._future.done():
                time.sleep(0.001)  # until its host has enqueued it: nothing but the device is left to wait for
            ended = threading.Thread(target=comm.synchronize)
            ended.start()
            deadline = time.monotonic() + 10
            while not hurry.is_set() and time.monotonic() < deadline:
                time.sleep(0.001)  # until that thread waits
            waited = hurry.is_set()
            ended.join()
            work.wait()
        comm.synchronize()
        return idle, waited, hurry.is_set()

    assert run_ranks(body, 2, "cuda_ipc:fake", timeout=10) == [(False, True, False)] * 2
