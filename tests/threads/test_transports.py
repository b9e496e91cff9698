"""The conformance kit on the transports whose ranks can be threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from ringred.communicator import Communicator
from ringred.runtime.config import Config
from ringred.testing import Faulty, conformance, conformance_plans
from ringred.testing.conformance import CHECKS
from ringred.testing.conformance_plans import CHECKS as PLAN_CHECKS
from ringred.testing.expecting import Check
from ringred.testing.fake_device import FakeDevice
from ringred.testing.ranks import connect
from ringred.transports import neighbours, routed
from ringred.transports.base import Counters, Fault, FaultKind, Request, Transport
from ringred.transports.local import Hub
from ringred.transports.torch_p2p import TorchP2PTransport

Connect = Callable[[int], Callable[[int], Transport]]


def delayed(connect: Connect) -> Connect:
    return lambda size: (lambda make: lambda rank: Faulty(make(rank), 0.002, seed=7))(connect(size))


class Awaited(Faulty):
    """A transport of a device that has always done what it was asked, as one of memory has; with random delays."""

    def isend(self, *arguments: Any, **options: Any) -> Request:
        request = super().isend(*arguments, **options)
        with contextlib.suppress(Fault):  # a wait raises it
            self._all_passed(time.monotonic() + 20)
        return request

    def wait(self, request: Request, deadline: float) -> Tensor | None:
        found = super().wait(request, deadline)
        self._all_passed(deadline)
        return found

    def _all_passed(self, deadline: float) -> None:
        assert self.queue is not None, "it is of a device"
        self.passed(self.queue.record(), deadline)

    def subset(self, members: Sequence[int], key: str) -> Transport:
        return Awaited(self.inner.subset(members, key), self.seconds, seed=8)


TRANSPORTS: dict[str, Connect] = {
    "local": lambda size: Hub(size).transport,
    "local-one-slot": lambda size: Hub(size, slots=1).transport,
    "local-delayed": delayed(lambda size: Hub(size).transport),
    "torch_p2p": lambda size: connect("torch_p2p", size),
    "shm": lambda size: connect("shm", size),
    "shm-python": lambda size: connect("shm:python", size),
    "shm-mixed": lambda size: connect("shm:mixed", size),
    "shm-delayed": delayed(lambda size: connect("shm", size)),
    "cuda_ipc": lambda size: (lambda make: lambda rank: Awaited(make(rank), 0.0005, seed=7))(
        connect("cuda_ipc:fake", size)
    ),
    "staged": lambda size: (lambda make: lambda rank: Awaited(make(rank), 0.0005, seed=7))(
        connect("staged:fake", size)
    ),
}


def run_check(check: Check, connect: Connect, size: int) -> None:
    make = connect(size)
    failures: list[BaseException] = []

    def rank_main(rank: int) -> None:
        transport = make(rank)
        try:
            check(transport)
        except BaseException as failure:
            failures.append(failure)
            transport.abort(repr(failure))
        finally:
            transport.close()

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def every(kit: Any) -> list[Check]:
    return [*kit.CHECKS.values(), *kit.BREAKING.values()]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("check", every(conformance), ids=lambda check: check.__name__)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_conforms(transport: str, check: Check, size: int) -> None:
    run_check(check, TRANSPORTS[transport], size)


# Not of a device, where all is enqueued and not done. "shm" has the compiled player, where there is one.
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("check", every(conformance_plans), ids=lambda check: check.__name__)
@pytest.mark.parametrize("transport", ["local", "local-one-slot", "torch_p2p", "shm", "shm-python", "shm-mixed"])
def test_plans_are_run_as_they_must_be(transport: str, check: Check, size: int) -> None:
    run_check(check, TRANSPORTS[transport], size)


def test_the_kit_is_not_blind() -> None:
    """A transport that swaps two messages, and one that forgets to count, do not pass."""

    class Swaps(Faulty):
        def irecv(self, peer, dst, lend):  # type: ignore[no-untyped-def]
            request = super().irecv(peer, dst, lend)
            request.index ^= 1
            return request

    def swapped(size: int) -> Callable[[int], Transport]:
        hub = Hub(size)
        return lambda rank: Swaps(hub.transport(rank), 0.0, seed=0)

    for check in (CHECKS["messages_keep_their_order"], PLAN_CHECKS["messages_of_a_plan_keep_their_order"]):
        with pytest.raises((AssertionError, Exception), match=r"message|mismatch"):
            run_check(check, swapped, 2)


class _Tells(Faulty):
    """A transport whose counters stand still, and whose mismatches are called a peer that is gone."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner, 0.0, seed=0)
        self.still = Counters()

    @property
    def counters(self) -> Counters:
        return self.still

    @counters.setter
    def counters(self, value: Counters) -> None:
        self.still = value

    def wait(self, request: Request, deadline: float) -> Tensor | None:
        try:
            return super().wait(request, deadline)
        except Fault as fault:
            kind = FaultKind.PEER if fault.kind == FaultKind.MISMATCH else fault.kind
            raise Fault(kind, fault.peer, fault.detail) from None


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (PLAN_CHECKS["a_plan_is_counted"], "counted: expected"),
        (
            conformance_plans.BREAKING["a_plan_of_another_collective_is_found_out"],
            "expected that a rank found mismatch",
        ),
    ],
)
def test_the_kit_of_plans_is_not_blind(check: Check, said: str) -> None:
    hub = Hub(2)
    with pytest.raises(AssertionError, match=said):
        run_check(check, lambda size: lambda rank: _Tells(hub.transport(rank)), 2)


def test_a_rank_that_is_alone_on_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cuts messages and chooses algorithms as the others do, in groups of some ranks too."""
    here, store, size = threading.local(), HashStore(), 3
    place = neighbours.place
    monkeypatch.setattr(neighbours, "place", lambda: f"{place()} {here.host}".replace(" ", "/"))
    texts, meeting, found = [""] * size, threading.Barrier(size), [[]] * size

    def rank_main(rank: int) -> None:
        here.host = "first" if rank < 2 else "second"

        def gather(text: str) -> list[str]:
            texts[rank] = text
            meeting.wait(20)
            everyone = list(texts)
            meeting.wait(20)
            return everyone

        def far() -> Transport:
            return TorchP2PTransport(store, rank, size, 20.0, "127.0.0.1")

        comm = Communicator(routed.join(gather, rank, size, far, 20.0), hosts=(0, 0, 1), config=Config(timeout=20.0))
        pair = comm.split(0 if rank != 1 else None)  # both of its ranks are alone in it
        sums = []
        for group in [comm] if pair is None else [comm, pair, pair.duplicate()]:
            there = group.on_device(lambda: FakeDevice(delay=(0.0002, rank)), torch.device("cpu"))
            assert there.transport.model == ("cuda_ipc+torch_p2p" if group is comm else there.transport.model)
            there.set_timeout(19.0)
            assert there.transport.timeout == 19.0, "its waits for the device, between hosts too"
            for elements in (10, 3_000_000):
                tensor, window = torch.ones(elements), there.empty(elements).fill_(1.0)
                group.all_reduce(tensor)
                there.all_reduce(tensor)
                there.all_reduce(window)
                sums.append(int(tensor[-1].item() / window[-1].item()))
        comm.barrier()
        comm.close()
        found[rank] = sums

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[3, 3, 2, 2, 2, 2], [3, 3], [3, 3, 2, 2, 2, 2]]
