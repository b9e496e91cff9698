"""A rank dies while others still make their models: those that are left begin with the same weights, and go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ringred
import ringred.ddp
from ringred.communicator import Communicator
from ringred.errors import TransportUnavailable
from ringred.runtime.seat import has_ended
from ringred.testing import run_ranks

TRANSPORTS = pytest.mark.parametrize("transport", ["local", "shm", "torch_p2p"])
RANKS = 4


class Died(Exception):
    pass


def model_of(rank: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 1, bias=False))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.01 * (rank + 1))
    return net


def begun(comm: Communicator, victim: int, place: str) -> tuple[int, float, torch.Tensor]:
    """How many ranks there are after three steps, what the weights were at first, and what they are then."""
    rank = comm.rank
    if place == "before" and rank == victim:
        raise Died
    if rank == RANKS - 1:
        time.sleep(0.2)  # the others wait for this one in their constructors
    net = model_of(rank)
    model = ringred.DistributedDataParallel(net, process_group=comm, on_failure="shrink", deterministic=True)
    first = next(net.parameters())[0, 0].item()
    if place == "made" and rank == victim:
        raise Died
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((4, 6), float(step)) + torch.arange(4.0).unsqueeze(1)).square().mean().backward()
        optimizer.step()
    return model.comm.size, first, torch.cat([p.detach().flatten() for p in net.parameters()])


def dying(victim: int, place: str) -> Callable[..., None]:
    """The broadcast of a constructor, in which `victim` dies before or after it."""
    broadcast, died = ringred.ddp.broadcast_tensors, []

    def or_dies(comm: Communicator, *arguments: Any, **options: Any) -> None:
        doomed = comm.rank == victim and comm.size == RANKS and not died
        if doomed and place == "checked":
            died.append(True)
            raise Died
        broadcast(comm, *arguments, **options)
        if doomed and place == "sent":
            died.append(True)
            raise Died

    return or_dies


@TRANSPORTS
@pytest.mark.parametrize("place", ["before", "checked", "sent", "made"])
@pytest.mark.parametrize("victim", [0, 2])
def test_those_that_are_left_begin_alike(
    victim: int, place: str, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ringred.ddp, "broadcast_tensors", dying(victim, place))
    results = run_ranks(lambda comm: begun(comm, victim, place), RANKS, transport, return_exceptions=True)
    assert isinstance(results.pop(victim), Died), results
    assert [result[0] for result in results] == [RANKS - 1] * (RANKS - 1), results
    first = results[0][1]
    assert first in [pytest.approx(0.01 * (rank + 1)) for rank in range(RANKS) if rank != victim or place != "before"]
    for _, other, weights in results:
        assert other == first
        assert torch.equal(weights, results[0][2])


def test_the_second_model_of_a_program() -> None:
    """A rank dies between its two models: the others have one that is whole, and one that is being made."""

    def body(comm: Communicator) -> tuple[int, int, bool]:
        rank = comm.rank
        one, two = model_of(rank), model_of(rank + RANKS)
        first = ringred.DistributedDataParallel(one, process_group=comm, on_failure="shrink")
        if rank == 1:
            raise Died
        second = ringred.DistributedDataParallel(two, process_group=comm, on_failure="shrink")
        for model in (first, second, first):
            model(torch.ones(4, 6) * torch.arange(4.0).unsqueeze(1)).sum().backward()
        grads = [p.grad for net in (one, two) for p in net.parameters()]
        return first.comm.size, second.comm.size, all(grad is not None for grad in grads)

    results = run_ranks(body, RANKS, "shm", return_exceptions=True)
    assert isinstance(results.pop(1), Died), results
    assert results == [(3, 3, True)] * 3


def test_a_model_that_is_made_over_the_communicator_that_has_failed_since() -> None:
    """A program keeps the communicator that it began with, and gives that to each of its models."""

    def body(comm: Communicator) -> tuple[int, int, bool]:
        first = ringred.DistributedDataParallel(model_of(comm.rank), process_group=comm, on_failure="shrink")
        for step in range(3):
            if (comm.rank, step) == (1, 1):
                raise Died
            first(torch.ones(4, 6) * torch.arange(4.0).unsqueeze(1)).sum().backward()
        net = model_of(comm.rank)
        second = ringred.DistributedDataParallel(net, process_group=comm, on_failure="shrink")
        for model in (second, first):
            model(torch.ones(4, 6) * torch.arange(4.0).unsqueeze(1)).sum().backward()
        return first.comm.size, second.comm.size, second.comm is first.comm

    results = run_ranks(body, RANKS, "shm", return_exceptions=True)
    assert isinstance(results.pop(1), Died), results
    assert results == [(3, 3, True)] * 3


def no_transport(victim: int | None) -> Callable[..., None]:
    """The broadcast of a constructor, in which no transport can be made once; `victim` has ended by then."""
    broadcast, refused = ringred.ddp.broadcast_tensors, set[int]()

    def refuses(comm: Communicator, *arguments: Any, **options: Any) -> None:
        if comm.size < RANKS or comm.rank in refused:
            broadcast(comm, *arguments, **options)
            return
        refused.add(comm.rank)
        if comm.rank == victim:
            raise Died
        seat = comm.seat
        assert seat is not None
        while victim is not None and not has_ended(seat.member, seat.view.members[victim]):
            time.sleep(0.01)  # until its end can be seen
        raise TransportUnavailable("no device here")

    return refuses


def test_a_transport_that_cannot_be_made_since_a_rank_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ringred.ddp, "broadcast_tensors", no_transport(2))
    results = run_ranks(lambda comm: begun(comm, 2, ""), RANKS, "shm", return_exceptions=True)
    assert isinstance(results.pop(2), Died), results
    assert [result[0] for result in results] == [RANKS - 1] * (RANKS - 1), results


def test_one_that_cannot_be_made_with_all_alive_is_raised_and_another_model_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ringred.ddp, "broadcast_tensors", no_transport(None))

    def body(comm: Communicator) -> int:
        net = model_of(comm.rank)
        with pytest.raises(TransportUnavailable, match="no device here"):
            ringred.DistributedDataParallel(net, process_group=comm, on_failure="shrink")
        model = ringred.DistributedDataParallel(net, process_group=comm, on_failure="shrink")
        for step in range(2):
            if (comm.rank, step) == (1, 1):
                raise Died
            model(torch.ones(4, 6) * torch.arange(4.0).unsqueeze(1)).sum().backward()
        return model.comm.size

    results = run_ranks(body, RANKS, "shm", return_exceptions=True)
    assert isinstance(results.pop(1), Died), results
    assert results == [RANKS - 1] * (RANKS - 1)
