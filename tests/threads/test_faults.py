"""Faults on purpose, and what the ranks say of them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import ringred
from ringred.communicator import Communicator
from ringred.errors import PeerFailed, ReplicasDiverged, RingredError
from ringred.testing import faults, run_ranks

TRANSPORTS = pytest.mark.parametrize("transport", ["local", "shm", "shm:python", "torch_p2p"])


@TRANSPORTS
@pytest.mark.parametrize("algorithm", ["ring", "torus", "tree"])
def test_a_rank_that_raises_at_a_message(algorithm: str, transport: str) -> None:
    def body(comm: Communicator) -> None:
        faults.inject(comm, "raise rank 2 at message 20")
        for _ in range(100):
            comm.all_reduce(torch.ones(1000), algorithm=algorithm)

    results = run_ranks(body, 4, transport, return_exceptions=True)
    assert isinstance(results[2], faults.InjectedFault)
    assert str(results[2]) == "raise rank 2 at message 20"
    for rank in (0, 1, 3):
        assert isinstance(results[rank], PeerFailed)
        assert "rank 2 raised InjectedFault" in str(results[rank])


@TRANSPORTS
def test_connections_that_are_cut(transport: str) -> None:
    noticed = threading.Event()

    def body(comm: Communicator) -> None:
        faults.inject(comm, "cut rank 1 at message 7")
        try:
            for number in range(100):
                if (
                    comm.rank == 0 and number == 50
                ):  # shared memory goes on without connections: who waits looks at them
                    noticed.wait(10)
                comm.all_reduce(torch.ones(1000), algorithm="ring")
        except RingredError:
            noticed.set()
            raise

    results = run_ranks(body, 3, transport, return_exceptions=True, timeout=5)
    assert all(isinstance(result, RingredError) for result in results), results


@TRANSPORTS
def test_a_wrong_bit_is_a_difference_of_replicas(transport: str) -> None:
    """Every rank adds what all others send: one bit to one of them, and its weights are not those of the others."""

    def body(comm: Communicator) -> None:
        faults.inject(comm, "flip rank 1 at byte 30000")
        net = nn.Linear(40, 40)
        model = ringred.DistributedDataParallel(net, process_group=comm, desync_check_every=1, algorithm="one_shot")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.ones(2, 40) * (comm.rank + 1)).square().mean().backward()
            optimizer.step()

    for result in run_ranks(body, 3, transport, return_exceptions=True):
        assert isinstance(result, ReplicasDiverged), result


def test_a_delay_is_waited_for() -> None:
    def body(comm: Communicator) -> float:
        faults.inject(comm, "delay rank 0 at message 3 for 0.3 s")
        total = torch.ones(5)
        for _ in range(5):
            comm.all_reduce(total)
        return total[0].item()

    assert run_ranks(body, 2, "shm") == [32.0, 32.0]


def test_a_step_of_a_model() -> None:
    def body(comm: Communicator) -> int:
        faults.inject(comm, "raise rank 1 at step 3")
        model = ringred.DistributedDataParallel(nn.Linear(3, 3), process_group=comm)
        for step in range(6):
            try:
                model(torch.ones(2, 3)).sum().backward()
            except faults.InjectedFault:
                comm.abort(ValueError("stopped"))
                return step
        return -1

    results = run_ranks(body, 2, "shm", return_exceptions=True)
    assert results[1] == 2
    assert isinstance(results[0], PeerFailed)


def test_random_faults_follow_from_the_seed() -> None:
    first = faults.at_random(5, 4, "kill", "message", 100, count=3)
    assert first == faults.at_random(5, 4, "kill", "message", 100, count=3)
    assert first != faults.at_random(6, 4, "kill", "message", 100, count=3)
    assert all(fault.rank < 4 and 1 <= fault.number <= 100 for fault in first)
    assert [faults.parse(str(fault)) for fault in first] == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kill rank 2", "expected a fault such as 'kill rank 2 at message 100'"),
        ("shrug rank 2 at message 1", "expected one of kill, stop, delay, raise, flip, cut at one of"),
        ("kill rank 2 at moon 1", "expected one of kill"),
        ("kill rank 2 at step 0", "≥ 1"),
        ("flip rank 0 at step 3", "flip is at a message or a byte"),
    ],
)
def test_what_is_no_fault(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        faults.parse(text)


def test_a_full_folder_is_full_and_empty_again(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    if space.f_bavail * space.f_frsize > 1 << 30:
        with (
            pytest.raises(ValueError, match=r"which would be memory; expected up to 1024"),
            faults.full_shm(str(tmp_path)),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
