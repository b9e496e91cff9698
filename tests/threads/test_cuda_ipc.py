"""Device memory, on a device that is none: sums under slow streams and time slices, and what must not go unnoticed."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringred.communicator import Communicator
from ringred.errors import CollectiveTimeout, PeerFailed, TransportUnavailable
from ringred.testing import run_ranks
from ringred.testing.fake_device import FakeDevice, Faults, Slices
from ringred.transports.cuda.plane import DevicePlane
from ringred.transports.links import ACKED, FLAG_STRIDE, SENT, TAKEN

ALGORITHMS = ("central", "direct", "double_tree", "halving_doubling", "one_shot", "ring", "torus", "tree")


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that are used again soon, and so too soon if nothing forbids it."""
    monkeypatch.setattr(DevicePlane, "slot_bytes", 1 << 10)
    monkeypatch.setattr(DevicePlane, "part_bytes", 4 << 10)


def wrong_sums(comm: Communicator, count: int, seed: int) -> int:
    """How many of `count` all-reduces of drawn sizes, algorithms and memories are wrong. All ranks draw alike."""
    draw, wrong = random.Random(seed), 0
    for turn in range(count):
        elements, algorithm = draw.choice((1, 7, 300, 5_000, 60_000)), draw.choice(ALGORITHMS)
        base = torch.arange(elements, dtype=torch.float32) % 89
        tensor = comm.empty(elements) if draw.random() < 0.5 else torch.empty(elements)
        tensor.copy_(base * (comm.rank + 1 + turn))
        comm.all_reduce(tensor, algorithm=algorithm)
        wrong += not torch.equal(tensor, base * sum(rank + 1 + turn for rank in range(comm.size)))
    return wrong


def slow(
    faults: Faults | None = None, slices: Slices | None = None, seconds: float = 0.0005
) -> Callable[[int], FakeDevice]:
    return lambda rank: FakeDevice(delay=(seconds, rank), faults=faults, slices=slices)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_slow_streams_add_right(size: int) -> None:
    assert run_ranks(lambda comm: wrong_sums(comm, 25, size), size, "cuda_ipc:fake", driver=slow()) == [0] * size


def test_a_device_that_serves_one_rank_at_a_time() -> None:
    slices = Slices()
    driver = slow(slices=slices)
    assert run_ranks(lambda comm: wrong_sums(comm, 15, 1), 3, "cuda_ipc:fake", driver=driver) == [0] * 3
    slices.close()


FAULTS = {
    "ignores_waits": Faults(ignores_waits=True),
    "signals_early": Faults(signals_early=True),
    "unfenced": Faults(unfenced=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stream_that_breaks_the_rules_is_noticed(fault: str) -> None:
    assert _noticed(slow(FAULTS[fault]))


@pytest.mark.parametrize("what", ["after_sent", "after_consumed"])
def test_a_wait_that_is_left_out_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DevicePlane, what, lambda *arguments: None)
    assert _noticed(slow())


def _noticed(driver: Callable[[int], Any]) -> bool:
    """Whether 300 all-reduces show that something is wrong."""

    def body(comm: Communicator) -> int:
        for seed in range(30):
            if wrong_sums(comm, 10, seed):
                return 1
        return 0

    found = run_ranks(body, 3, "cuda_ipc:fake", driver=driver, timeout=10, return_exceptions=True)
    return any(isinstance(result, Exception) or result for result in found)


def late_writers(comm: Communicator) -> int:
    """How many of 20 broadcasts into windows are wrong, where each rank's own stream still writes to its window."""
    device = comm.transport.queue.driver  # type: ignore[union-attr]
    device.current = current = device.stream()
    wrong = 0
    for turn in range(20):
        target, written = comm.empty(3000), torch.full((3000,), float(comm.rank + turn))
        comm.barrier()
        current.stall(0.002 * ((comm.rank + turn) % 3))
        current.copy(target.data_ptr(), written.data_ptr(), target.nbytes)
        comm.broadcast(target, turn % comm.size)
        current.record().wait()
        wrong += not torch.equal(target, torch.full_like(target, turn % comm.size + turn))
    device.current = None
    current.close()
    return wrong


def test_what_the_program_has_enqueued_comes_first() -> None:
    assert run_ranks(late_writers, 3, "cuda_ipc:fake") == [0] * 3


@pytest.mark.parametrize("what", ["after_exposed", "here", "precede"])
def test_not_to_wait_for_the_program_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DevicePlane, what, lambda *arguments: what == "precede" or None)
    found = run_ranks(late_writers, 3, "cuda_ipc:fake", timeout=10, return_exceptions=True)
    assert any(isinstance(result, Exception) or result for result in found)


def test_ranks_that_may_not_open_each_others_memory_say_so() -> None:
    def driver(rank: int) -> FakeDevice:
        return FakeDevice(refuses_peers=rank == 1)

    for failure in run_ranks(lambda comm: comm.rank, 3, "cuda_ipc:fake", driver=driver, return_exceptions=True):
        assert isinstance(failure, TransportUnavailable)
        assert "peer access is not supported" in str(failure) or "rank 1 cannot" in str(failure)


def test_a_rank_without_a_device_ends_all_before_anything_began() -> None:
    def body(comm: Communicator) -> str:
        def driver() -> FakeDevice:
            if comm.rank == 2:
                raise TransportUnavailable("no device here")
            return FakeDevice()

        with pytest.raises(TransportUnavailable) as raised:
            comm.on_device(driver, torch.device("cpu"))
        tensor = torch.ones(3)
        comm.all_reduce(tensor)  # goes on
        assert tensor[0].item() == 3
        return str(raised.value)

    first, _, third = run_ranks(body, 3, "shm")
    assert "rank 2 cannot" in first
    assert "no device here" in third


def test_tensors_of_the_host_and_of_a_device_in_turn() -> None:
    def body(comm: Communicator) -> float:
        there = comm.on_device(lambda: FakeDevice(delay=(0.0005, comm.rank)), torch.device("cpu"))
        for turn in range(10):
            tensor, other = torch.full((5000,), float(turn)), torch.full((100,), 1.0)
            work = there.all_reduce(tensor, async_op=True)
            comm.all_reduce(other)
            work.wait()
            assert tensor[-1].item() == turn * comm.size
            assert other[0].item() == comm.size
        return 1.0

    assert run_ranks(body, 3, "shm") == [1.0] * 3


def test_a_failure_on_the_host_ends_the_device_too() -> None:
    def body(comm: Communicator) -> None:
        there = comm.on_device(FakeDevice, torch.device("cpu"))
        if comm.rank == 0:
            raise ValueError("of its own")
        there.all_reduce(torch.ones(10))

    _, *others = run_ranks(body, 3, "shm", return_exceptions=True, timeout=20)
    assert all(isinstance(failure, PeerFailed) and "of its own" in str(failure) for failure in others), others


def test_tensors_of_no_device_that_can_be_used() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(TransportUnavailable, match="torch sees no CUDA device"):
            comm.empty(3, device="cuda")

    run_ranks(body, 2, "shm")
    with pytest.raises(TransportUnavailable, match="cuda cannot be used: torch sees no CUDA device"):
        run_ranks(lambda comm: comm.empty(3, device="cuda"), 2, "local")


class Stuck(FakeDevice):
    """A device whose streams stop before their `at`-th operation, for `seconds`."""

    def __init__(self, at: int, seconds: float) -> None:
        super().__init__()
        self.at, self.seconds = at, seconds

    def stream(self) -> Any:
        stream = super().stream()
        copy, done = stream.copy, iter(range(10**9))

        def stops(*arguments: Any) -> None:
            if next(done) == self.at:
                stream.stall(self.seconds)
            copy(*arguments)

        stream.copy = stops  # type: ignore[method-assign]
        return stream


def test_a_stream_that_stands_still_is_named_at_the_deadline_and_no_other_hangs() -> None:
    def body(comm: Communicator) -> None:
        for _ in range(50):
            comm.all_reduce(torch.ones(2000), algorithm="direct")

    def driver(rank: int) -> FakeDevice:
        return Stuck(20, 3.0) if rank == 1 else FakeDevice()

    began = time.monotonic()
    failures = run_ranks(body, 3, "cuda_ipc:fake", driver=driver, timeout=1.0, return_exceptions=True)
    assert time.monotonic() - began < 6
    assert all(isinstance(failure, (CollectiveTimeout, PeerFailed)) for failure in failures), failures
    assert "rank 1" in str(failures[0])
    assert "rank 1" in str(failures[2])


def test_what_a_drained_stream_sends_on_is_nobodys_result() -> None:
    def body(comm: Communicator) -> torch.Tensor:
        comm.set_timeout(0.3 if comm.rank == 2 else 5.0)
        target = torch.full((2000,), 7.0) if comm.rank == 0 else torch.zeros(2000)
        comm.broadcast(target, algorithm="tree")
        return target

    def driver(rank: int) -> FakeDevice:
        return Stuck(0, 0.8) if rank == 0 else FakeDevice()

    for _ in range(4):
        results = run_ranks(body, 4, "cuda_ipc:fake", driver=driver, return_exceptions=True)
        assert isinstance(results[2], CollectiveTimeout)
        for result in results:
            assert isinstance(result, (CollectiveTimeout, PeerFailed)) or result.eq(7.0).all(), result


def test_memory_is_kept_until_the_streams_of_peers_have_read_it() -> None:
    def body(comm: Communicator) -> torch.Tensor:
        child = comm.split(0)
        target = torch.full((3000,), 5.0) if comm.rank == 0 else torch.zeros(3000)
        child.broadcast(target)
        child.close()
        if comm.rank == 0:
            for _ in range(4):
                comm.empty(1 << 20).fill_(-1.0)
        return target

    def driver(rank: int) -> FakeDevice:
        return FakeDevice() if rank == 0 else Stuck(1, 0.4)

    for result in run_ranks(body, 2, "cuda_ipc:fake", driver=driver):
        assert result.eq(5.0).all()


@pytest.mark.parametrize("what", ["stream", "register"])
def test_a_rank_that_fails_late_is_heard_of(what: str) -> None:
    def refuses(*arguments: object) -> None:
        raise RuntimeError("out of something")

    def body(comm: Communicator) -> str:
        driver = FakeDevice()
        if comm.rank == 1:
            setattr(driver, what, refuses)
        with pytest.raises(TransportUnavailable) as raised:
            comm.on_device(lambda: driver, torch.device("cpu"))
        return str(raised.value)

    first, second, _ = run_ranks(body, 3, "shm")
    assert "rank 1 cannot" in first
    assert "out of something" in second


def test_a_rank_that_raises_drains_the_streams_that_wait_for_it() -> None:
    def body(comm: Communicator) -> None:
        comm.all_reduce(torch.ones(10))
        if comm.rank == 2:
            raise ValueError("of its own")
        comm.all_reduce(torch.ones(100_000))

    began = time.monotonic()
    *others, culprit = run_ranks(body, 3, "cuda_ipc:fake", driver=slow(), timeout=20, return_exceptions=True)
    assert time.monotonic() - began < 3
    assert isinstance(culprit, ValueError)
    assert all(isinstance(failure, PeerFailed) and "of its own" in str(failure) for failure in others)


def test_flags_go_on_past_32_bits() -> None:
    def body(comm: Communicator) -> int:
        transport: Any = comm.transport
        plane, before = transport.queue, (1 << 32) - 40
        for link in transport._links.values():
            link.state[SENT] = link.state[ACKED] = link.state[TAKEN] = before
            transport._words[link.taken_at] = before
            for kind in range(2):
                at = plane._layout.flags + FLAG_STRIDE * (2 * link.index + kind) + transport._block
                transport.window.memory[at : at + 4] = before.to_bytes(4, "little")
        meeting.wait(20)
        wrong = wrong_sums(comm, 40, 3)
        assert min(link.state[SENT] for link in transport._links.values()) > 1 << 32
        return wrong

    meeting = threading.Barrier(3)
    assert run_ranks(body, 3, "cuda_ipc:fake", driver=slow()) == [0] * 3


def test_memory_is_used_again_and_chunks_are_made_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "chunk_bytes", 1 << 20)

    def body(comm: Communicator) -> tuple[int, int]:
        device = comm.transport._device  # type: ignore[attr-defined]
        for _ in range(40):
            tensor = comm.empty(1 << 16)  # 256 KiB of chunks of 1 MiB
            tensor.fill_(1.0)
            comm.all_reduce(tensor)
            assert tensor[0].item() == comm.size
            del tensor
        few = len(device._chunks)
        large = comm.empty(3 << 17)  # more than a chunk
        large.fill_(comm.rank)
        comm.all_reduce(large)
        assert large[-1].item() == 1
        return few, len(device._chunks)

    for few, then in run_ranks(body, 2, "cuda_ipc:fake"):
        assert few <= 2
        assert then == few + 1


def test_nothing_is_left() -> None:
    def body(comm: Communicator) -> None:
        comm.all_reduce(comm.empty(5000).fill_(1.0))
        if comm.rank == 0:  # sends, and goes while the others' slow streams still read
            comm.broadcast(torch.ones(200_000))
        else:
            target = torch.zeros(200_000)
            comm.broadcast(target)
            assert target.eq(1).all()

    def left() -> tuple[int, int]:
        gc.collect()
        streams = [thread for thread in threading.enumerate() if thread.name == "ringred-fake-stream"]
        return len(os.listdir("/proc/self/fd")), len(streams)

    run_ranks(body, 3, "cuda_ipc:fake", driver=slow())
    before = left()
    for _ in range(3):
        run_ranks(body, 3, "cuda_ipc:fake", driver=slow())
    assert left() == before


def test_communicators_of_some_ranks_share_the_memory_and_fail_alone() -> None:
    def body(comm: Communicator) -> float:
        pair = comm.split(comm.rank // 2)
        tensor = comm.empty(10_000)
        tensor.fill_(comm.rank)
        pair.all_reduce(tensor)
        pair.close()
        comm.all_reduce(tensor)
        return tensor[0].item()

    assert run_ranks(body, 4, "cuda_ipc:fake", driver=slow()) == [12.0] * 4


def main(count: int) -> None:
    """`python -m tests.threads.test_cuda_ipc 10000`: so many all-reduces on drawn numbers of ranks and delays."""
    DevicePlane.slot_bytes, DevicePlane.part_bytes = 1 << 10, 4 << 10
    draw, done, wrong = random.Random(0), 0, 0
    while done < count:
        size, seconds, seed = draw.randint(2, 5), draw.choice((0.0, 0.0002, 0.001)), draw.randrange(1 << 30)
        sums = functools.partial(wrong_sums, count=50, seed=seed)
        wrong += max(run_ranks(sums, size, "cuda_ipc:fake", driver=slow(seconds=seconds)))
        done += 50
    print(f"{done} all-reduces: {wrong} wrong")


if __name__ == "__main__":
    main(int(sys.argv[1]))
