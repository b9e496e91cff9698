"""All that servers have: collected, given back to another number of them, written to disk, and gone on from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.errors import CollectiveTimeout, PolicyError
from ringred.parameter_server import Store, read_snapshot
from ringred.parameter_server.policies import Async, KAsync, KBatchSync, Policy, Sync
from ringred.parameter_server.training import ParameterServer
from ringred.testing import run_ranks
from tests.threads.test_parameter_server import batches, loss_of, make_model, values_of

HALF, STEPS = 7, 15


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 5)


def train(server: ParameterServer, model: nn.Module, rank: int, start: int, stop: int) -> None:
    for batch in batches(rank)[start:stop]:
        assert server.pull()
        loss_of(model, batch).backward()
        server.push()
    server.pull()


def straight(ranks: int) -> list[Tensor]:
    def body(comm: ringred.Communicator) -> list[Tensor]:
        model = make_model()
        with ParameterServer(model, adam, Sync(), schedule=schedule, comm=comm) as server:
            train(server, model, comm.rank, 0, STEPS)
        return values_of(model)

    return run_ranks(body, ranks)[0]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2), (2, 2)])
def test_a_state_goes_on_alike_on_another_number_of_shards(
    before: int, after: int, shared: bool, tmp_path: Path
) -> None:
    def first(comm: ringred.Communicator) -> Any:
        model = make_model()
        options: Any = {"shards": before, "shared": shared, "schedule": schedule, "comm": comm}
        with ParameterServer(model, adam, Sync(), **options) as server:
            train(server, model, comm.rank, 0, HALF)
            return server.state_dict()

    states = run_ranks(first, 3)
    path = tmp_path / "state.pt"
    torch.save(states[0], path)
    state = torch.load(path, weights_only=True)
    assert state["version"] == HALF
    assert set(state["tensors"]) == {name for name, _ in make_model().named_parameters()}

    def second(comm: ringred.Communicator) -> tuple[list[Tensor], Any]:
        model = make_model()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        options: Any = {"shards": after, "shared": shared, "schedule": schedule, "comm": comm}
        with ParameterServer(model, adam, Sync(), **options) as server:
            server.load_state_dict(state)
            train(server, model, comm.rank, HALF, STEPS)
            report = server.report()
        return values_of(model), report

    wanted = straight(3)
    for found, report in run_ranks(second, 3):
        assert equal(found, wanted)
        assert report.updates == STEPS
        assert report.staleness == {0: 3 * STEPS}


def test_a_state_that_is_collected_while_others_push_is_of_one_version() -> None:
    """With gradients of one and a rate of one, every element is minus the version."""

    def body(comm: ringred.Communicator) -> None:
        model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        with ParameterServer(model, lambda given: torch.optim.SGD(given, lr=1.0), Async(), comm=comm) as server:
            for turn in range(60):
                server.pull()
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)
                server.push()
                if turn % 10 == comm.rank:
                    state = server.state_dict()
                    for entry in state["tensors"].values():
                        assert torch.all(entry["value"] == -state["version"]), (turn, state["version"])

    run_ranks(body, 4)


@pytest.mark.parametrize("replicate", [False, True])
def test_servers_go_on_from_their_newest_snapshot(replicate: bool, tmp_path: Path) -> None:
    def body(comm: ringred.Communicator, start: int, stop: int, shards: int) -> Any:
        model = make_model()
        options: Any = {"snapshots": tmp_path, "every": 3, "shards": shards, "replicate": replicate}
        with ParameterServer(model, adam, Sync(), schedule=schedule, comm=comm, **options) as server:
            train(server, model, comm.rank, start, stop)
            return values_of(model), server.report().updates

    run_ranks(lambda comm: body(comm, 0, HALF, 2), 3)
    assert sorted(path.name[:19] for path in tmp_path.iterdir()) == ["update-000000000003", "update-000000000006"]
    wanted = straight(3)
    for found, updates in run_ranks(lambda comm: body(comm, 6, STEPS, 3), 3):
        assert updates == STEPS
        assert equal(found, wanted)
    assert sorted(path.name[:19] for path in tmp_path.iterdir()) == ["update-000000000012", "update-000000000015"]
    assert read_snapshot(tmp_path)["version"] == STEPS


def test_a_snapshot_on_demand_and_damage_are_told(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=f"there is no snapshot in {tmp_path}"):
        read_snapshot(tmp_path)

    def body(comm: ringred.Communicator) -> None:
        model = make_model()
        with ParameterServer(model, adam, Sync(), comm=comm) as server:
            train(server, model, comm.rank, 0, 2)
            if comm.rank == 1:
                assert server.save(tmp_path / "here") == 2
            with pytest.raises(PolicyError, match=r"there is no snapshot of version 2: shard \d: NotADirectoryError"):
                server.save("/dev/null/nowhere")

    run_ranks(body, 2)
    (place,) = (tmp_path / "here").iterdir()
    assert sorted(path.name for path in place.iterdir()) == ["shard-0.pt", "shard-1.pt", "whole.json"]
    assert read_snapshot(place)["version"] == read_snapshot(tmp_path / "here")["version"] == 2
    whole = (place / "shard-1.pt").read_bytes()
    (place / "shard-1.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PolicyError, match="is damaged"):
        read_snapshot(place)
    (place / "shard-1.pt").unlink()
    with pytest.raises(PolicyError, match="is damaged: FileNotFoundError"):
        read_snapshot(place)
    (place / "whole.json").write_text(json.dumps({"shards": 1}))
    with pytest.raises(PolicyError, match="is damaged: KeyError"):
        read_snapshot(place)


def test_states_that_do_not_fit_are_refused() -> None:
    def collected(comm: ringred.Communicator) -> Any:
        with ParameterServer(make_model(), adam, Sync(), comm=comm) as server:
            train(server, make_model(), comm.rank, 0, 0)
            return server.state_dict()

    (state,) = run_ranks(collected, 1)

    def body(comm: ringred.Communicator) -> None:
        model = make_model()
        with ParameterServer(model, lambda given: torch.optim.SGD(given, lr=0.1), Async(), comm=comm) as server:
            with pytest.raises(PolicyError, match="no state of a parameter server: version, rate"):
                server.load_state_dict(model.state_dict())
            with pytest.raises(PolicyError, match=r"expected a state under the rule .*SGD.*got .*Adam"):
                server.load_state_dict(state)
        few = [nn.Parameter(torch.zeros(3))]
        unlike = pytest.raises(PolicyError, match=r"other tensors: missing \['parameter 0'\], unknown \['0.bias'")
        with ParameterServer(few, adam, Async(), comm=comm) as server, unlike:
            server.load_state_dict(state)
        other = {**state, "tensors": {**state["tensors"]}}
        other["tensors"]["0.bias"] = {**other["tensors"]["0.bias"], "value": torch.zeros(9)}
        with ParameterServer(model, adam, Async(), comm=comm) as server:
            with pytest.raises(PolicyError, match=r"'0.bias': expected 150 elements, the state has 9"):
                server.load_state_dict(other)
            train(server, model, comm.rank, 0, 1)
            with pytest.raises(PolicyError, match="comes too late: there were 1 updates; every worker gives it before"):
                server.load_state_dict({**state, "version": 40})

    run_ranks(body, 1)
    with pytest.raises(PolicyError, match="a snapshot every 5 updates, in None: expected a number ≥ 1, and a folder"):
        run_ranks(lambda comm: ParameterServer(make_model(), adam, comm=comm, every=5), 1)


@pytest.mark.parametrize("policy", [Sync(), KBatchSync(1), KAsync(2)])
def test_a_worker_that_computed_before_the_state_came_starts_again(policy: Policy) -> None:
    def collected(comm: ringred.Communicator) -> Any:
        model = make_model()
        with ParameterServer(model, adam, Sync(), comm=comm) as server:
            train(server, model, comm.rank, 0, 3)
            return server.state_dict()

    (state,) = run_ranks(collected, 1)

    def body(comm: ringred.Communicator) -> int:
        model = make_model()
        barrier = torch.zeros(1)
        with ParameterServer(model, adam, policy, comm=comm, updates=10) as server:
            if comm.rank == 1:
                server.pull()
            comm.all_reduce(barrier)
            if comm.rank == 0:
                server.load_state_dict(state)
            comm.all_reduce(barrier)
            while server.pull(timeout=20.0):
                loss_of(model, batches(comm.rank)[0]).backward()
                server.push()
            return server.report().updates

    assert run_ranks(body, 2) == [10, 10]


def test_a_store_is_kept_too(tmp_path: Path) -> None:
    def body(comm: ringred.Communicator) -> tuple[float, int]:
        with Store("add", Sync(), comm=comm, snapshots=tmp_path, every=2) as store:
            store.init("total", torch.zeros(300))
            for _ in range(2):
                store.push("total", torch.ones(300))
            out = torch.empty(300)
            return store.pull("total", out), out.sum().item()

    assert run_ranks(body, 2) == [(2, 600.0)] * 2
    assert run_ranks(body, 2) == [(4, 1200.0)] * 2


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
def test_layers_wait_for_their_own_parameters(shared: bool) -> None:
    """Large enough for several groups; the bits are those of a pull that waits for all."""

    def body(comm: ringred.Communicator, overlap: bool) -> list[Tensor]:
        torch.manual_seed(0)
        sizes = [33, 600, 600, 600, 7]
        layers = [nn.Linear(given, made) for given, made in itertools.pairwise(sizes)]
        model = nn.Sequential(*layers, nn.Linear(7, 7))
        model[-1].weight.requires_grad_(False)
        options: Any = {"overlap": overlap, "shared": shared, "comm": comm}
        with ParameterServer(model, lambda given: torch.optim.SGD(given, lr=0.1), Sync(), **options) as server:
            assert not overlap or len(server._way._arriving._targets) == 3
            for batch in batches(comm.rank)[:6]:
                server.pull()
                waiting = len(server._way._arriving._pulls)
                loss_of(model, batch).backward()
                assert waiting == (3 if overlap else 0)
                assert not server._way._arriving._pulls
                assert server.push()
            server.pull()
            server.arrive()
        return values_of(model)

    torch.set_num_threads(1)
    wanted = run_ranks(lambda comm: body(comm, False), 1)
    assert equal(run_ranks(lambda comm: body(comm, True), 1)[0], wanted[0])


def test_overlap_needs_layers() -> None:
    with pytest.raises(TypeError, match="overlap needs a module, whose layers wait for their parameters; got list"):
        run_ranks(lambda comm: ParameterServer([nn.Parameter(torch.zeros(3))], adam, comm=comm, overlap=True), 1)


def test_a_server_that_does_not_come_to_a_version_lets_layers_time_out() -> None:
    def body(comm: ringred.Communicator) -> None:
        model = make_model()
        with ParameterServer(model, adam, Async(), comm=comm, overlap=True) as server:
            server.pull()
            server._way._arriving.start(5, 0.2)
            with pytest.raises(CollectiveTimeout, match="shard 0 did not reach version 5, it is at 0"):
                model(torch.zeros(1, 33))
            server._way._arriving._pulls.clear()

    run_ranks(body, 1)
