"""The ranks of a host as one worker of a parameter server: here hosts are told apart by name only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.errors import PeerFailed, PolicyError, RingredError
from ringred.parameter_server import hosting
from ringred.parameter_server.policies import Async, KAsync, KBatchAsync, KBatchSync, KSync, SoftSync, Sync
from ringred.parameter_server.price import cheaper, price
from ringred.parameter_server.training import ParameterServer
from ringred.runtime.select import machine_model
from ringred.testing import run_ranks
from tests.threads.test_parameter_server import OPTIMIZERS, batches, loss_of, make_model, values_of

TWO = (0, 0, 1, 1)


def on_hosts(comm: ringred.Communicator, hosts: tuple[int, ...]) -> ringred.Communicator:
    comm.hosts = hosts
    comm.config = replace(comm.config, interface="127.0.0.1")
    return comm


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
@pytest.mark.parametrize(("hosts", "shards"), [((0, 0), 1), (TWO, 1), (TWO, 3), ((0, 1, 0, 1), 4), ((0, 0, 0), 2)])
def test_sync_by_host_equals_ddp(hosts: tuple[int, ...], shards: int, shared: bool, optimizer: str) -> None:
    def by_host(comm: ringred.Communicator) -> list[Tensor]:
        model = make_model()
        options: Any = {"hierarchy": "host", "shards": shards, "shared": shared, "comm": on_hosts(comm, hosts)}
        with ParameterServer(model, OPTIMIZERS[optimizer], Sync(), **options) as server:
            for batch in batches(comm.rank)[:8]:
                assert server.pull()
                loss_of(model, batch).backward()
                assert server.push()
            server.pull()
            report = server.report()
        assert report.applied == dict.fromkeys(set(hosts), 8)
        return values_of(model)

    def by_ddp(comm: ringred.Communicator) -> list[Tensor]:
        model = make_model()
        wrapped = ringred.DistributedDataParallel(model, process_group=comm)
        stepper = OPTIMIZERS[optimizer](model.parameters())
        for batch in batches(comm.rank)[:8]:
            stepper.zero_grad()
            loss_of(wrapped, batch).backward()
            stepper.step()
        return values_of(model)

    wanted = run_ranks(by_ddp, len(hosts))[0]
    found = run_ranks(by_host, len(hosts))
    for values in found:
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(values, found[0], strict=True))


@pytest.mark.parametrize("hierarchy", ["flat", "host"])
def test_short_pieces_of_a_job_on_several_hosts_change_no_bit(monkeypatch: pytest.MonkeyPatch, hierarchy: str) -> None:
    def body(comm: ringred.Communicator, state: Any) -> tuple[int, list[Tensor], Any]:
        model = nn.Linear(64, 100)
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.5)
        options: Any = {"hierarchy": hierarchy, "shards": 2, "comm": on_hosts(comm, TWO), "shared": False}
        with ParameterServer(model, OPTIMIZERS["adam"], Sync(), **options) as server:
            if state is not None:
                server.load_state_dict(state)
            for step in range(3):
                assert server.pull()
                for parameter in model.parameters():
                    varied = torch.linspace(-1, 1 + comm.rank + step, parameter.numel())
                    parameter.grad = varied.view_as(parameter)
                assert server.push()
            server.pull()
            after = server.state_dict()
            return max(map(len, server.worker.pieces.values())), [value.clone() for value in values_of(model)], after

    def trained(state: Any = None) -> tuple[int, list[Tensor], Any]:
        return run_ranks(lambda comm: body(comm, state), 4)[0]

    pieces, whole, state = trained()
    _, further, _ = trained(state)
    monkeypatch.setattr(hosting, "SEALED_BYTES", 1024)
    more_pieces, short, again = trained()
    assert more_pieces > 5 * pieces
    assert all(map(torch.equal, short, whole))
    for given in (state, again):
        assert all(map(torch.equal, trained(given)[1], further)), "a state goes on, however its pieces lay"


@pytest.mark.parametrize("policy", [KSync(1), KBatchSync(1), KAsync(1), Async(), KBatchAsync(3), SoftSync(1)])
def test_every_update_is_made_once_whatever_the_policy(policy: Any) -> None:
    """With gradients of one and a rate of one, each update takes one off."""

    def body(comm: ringred.Communicator) -> None:
        model = nn.Linear(30, 50)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        options: Any = {"hierarchy": "host", "updates": 25, "comm": on_hosts(comm, TWO)}
        with ParameterServer(model, lambda given: torch.optim.SGD(given, lr=1.0), policy, **options) as server:
            while server.pull():
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                if not server.cancelled:
                    server.push()
            for parameter in model.parameters():
                assert torch.all(parameter == -25)
            assert server.report().updates == 25

    run_ranks(body, 4)


def test_parameters_that_some_or_all_ranks_do_not_use() -> None:
    """What no rank has a gradient for is left alone, weight decay and all; else what is missing counts as zeros."""

    def body(comm: ringred.Communicator) -> list[Tensor]:
        parts = nn.ParameterList([nn.Parameter(torch.ones(100)) for _ in range(3)])
        options: Any = {"hierarchy": "host", "comm": on_hosts(comm, TWO)}

        def optimizer(given: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(given, lr=1.0, weight_decay=0.5)

        with ParameterServer(parts, optimizer, Sync(), **options) as server:
            server.pull()
            used = [parts[0].sum() * 4]
            if comm.rank == 3:
                used.append(parts[1].sum() * 4)
            sum(used).backward()  # type: ignore[union-attr]
            server.push()
            server.pull()
        return values_of(parts)

    for first, second, third in run_ranks(body, 4):
        assert torch.all(first == 1 - 0.5 - 4)
        assert torch.all(second == 1 - 0.5 - 1)
        assert torch.all(third == 1)


def test_mini_batches_that_are_left_out_or_begun_by_some_ranks_only_end_alike() -> None:
    def body(comm: ringred.Communicator) -> tuple[int, float]:
        model = nn.Linear(1200, 1000)
        options: Any = {"hierarchy": "host", "comm": on_hosts(comm, TWO)}
        with ParameterServer(model, lambda given: torch.optim.SGD(given, lr=0.1), Async(), **options) as server:
            server.pull()
            before = model.weight.sum().item()
            if comm.rank % 2:
                model(torch.ones(1, 1200)).sum().backward()
            with server.no_sync():
                model(torch.ones(1, 1200)).sum().backward()
            server.push()
            server.pull()
            return server.report().updates, before - model.weight.sum().item()

    for updates, change in run_ranks(body, 4):
        assert updates in (1, 2)
        assert change != 0


def test_two_backwards_without_no_sync_are_told_apart() -> None:
    def body(comm: ringred.Communicator) -> None:
        model = nn.Linear(3, 2)
        options: Any = {"hierarchy": "host", "comm": on_hosts(comm, (0, 0))}
        with ParameterServer(model, lambda given: torch.optim.SGD(given, lr=0.1), Async(), **options) as server:
            server.pull()
            with server.no_sync():
                model(torch.ones(1, 3)).sum().backward()
            model(torch.ones(1, 3)).sum().backward()
            with pytest.raises(PolicyError, match="has a second gradient in a mini-batch"):
                model(torch.ones(1, 3)).sum().backward()
            server.push()

    run_ranks(body, 2)


def test_what_the_first_rank_of_a_host_is_refused_all_its_ranks_are_told() -> None:
    def body(comm: ringred.Communicator) -> None:
        model = nn.Linear(3, 2 + comm.rank // 2)
        options: Any = {"hierarchy": "host", "comm": on_hosts(comm, TWO)}
        ParameterServer(model, OPTIMIZERS["sgd"], Async(elastic=True), **options).close()

    found = run_ranks(body, 4, return_exceptions=True)
    failed = [isinstance(failure, RingredError) for failure in found]
    assert failed in ([False, False, True, True], [True, True, False, False], [True] * 4), found


def test_a_rank_that_raises_ends_its_host_and_is_named() -> None:
    def body(comm: ringred.Communicator) -> Any:
        model = make_model()
        options: Any = {"hierarchy": "host", "comm": on_hosts(comm, TWO)}
        with ParameterServer(model, OPTIMIZERS["sgd"], Sync(), **options) as server:
            for step, batch in enumerate(batches(comm.rank)):
                server.pull()
                if comm.rank == 3 and step == 2:
                    raise ArithmeticError("of rank 3")
                loss_of(model, batch).backward()
                server.push()

    first, _, third, fourth = run_ranks(body, 4, return_exceptions=True)
    assert isinstance(fourth, ArithmeticError)
    assert isinstance(third, PeerFailed)
    assert isinstance(first, RingredError)
    assert "of rank 3" in str(first) or "worker 1" in str(first)


def test_hosts_with_unlike_numbers_of_ranks_and_strange_words_are_refused() -> None:
    def body(comm: ringred.Communicator, **options: Any) -> None:
        ParameterServer(make_model(), OPTIMIZERS["sgd"], comm=on_hosts(comm, (0, 0, 1)), **options)

    for options, said in (
        ({"hierarchy": "host"}, r"hosts with \[1, 2\] ranks; hierarchy='host' needs as many on each"),
        ({"hierarchy": "rack"}, "hierarchy: expected 'flat', 'host' or 'auto', got 'rack'"),
        ({"hierarchy": "host", "overlap": True}, "overlap is for hierarchy='flat'"),
    ):
        with pytest.raises(PolicyError, match=said):
            run_ranks(lambda comm, options=options: body(comm, **options), 3)


def test_the_price_by_host_is_less_where_the_network_is_slow() -> None:
    nbytes = 25 << 20
    eight = (0,) * 4 + (1,) * 4
    slow = machine_model("shm+torch_p2p", eight)
    flat, host = (price(nbytes, eight, 8, slow, by_host=which) for which in (False, True))
    assert 3.5 < flat / host < 4.1, "four ranks on a host: a quarter of the bytes"
    assert cheaper(nbytes, eight, 8, slow)
    assert not cheaper(nbytes, tuple(range(8)), 8, slow), "one rank on each host"
    assert not cheaper(nbytes, (0, 0, 1), 3, slow), "not as many on each"
    assert price(nbytes, (0, 1), 2, slow, by_host=False) == pytest.approx(
        2 * (2 * slow.distance[1][0] + nbytes / 2 * slow.distance[1][1])
        + 2 * nbytes / 2 * slow.distance[0][1]
        + nbytes * slow.gamma
    )
