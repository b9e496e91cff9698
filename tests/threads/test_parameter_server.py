"""The parameter server on workers that are threads: equal to DDP, every policy, every refusal, both ways of memory."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.errors import CollectiveTimeout, PeerFailed, PolicyError, TooFewWorkers, UnsupportedTensor
from ringred.parameter_server.policies import Async, KAsync, KSync, Sync, parse
from ringred.parameter_server.training import ParameterServer
from ringred.testing import run_ranks

STEPS = 20
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}
_seeding = threading.Lock()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model() -> nn.Module:
    with _seeding:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(33, 150), nn.ReLU(), nn.Linear(150, 7))


def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(8, 33, generator=generator), torch.randint(0, 7, (8,), generator=generator)) for _ in range(STEPS)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def values_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def by_ddp(comm: ringred.Communicator, optimizer: str) -> list[Tensor]:
    model = make_model()
    wrapped = ringred.DistributedDataParallel(model, process_group=comm, deterministic=True)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    for batch in batches(comm.rank):
        stepper.zero_grad()
        loss_of(wrapped, batch).backward()
        stepper.step()
    return values_of(model)


def by_server(comm: ringred.Communicator, optimizer: str, **options: Any) -> list[Tensor]:
    model = make_model()
    with ParameterServer(model, OPTIMIZERS[optimizer], Sync(), comm=comm, **options) as server:
        for batch in batches(comm.rank):
            assert server.pull()
            loss_of(model, batch).backward()
            assert server.push()
        server.pull()
        report = server.report()
    assert report.updates == STEPS
    assert report.staleness == {0: STEPS * comm.size}
    assert report.applied == dict.fromkeys(range(comm.size), STEPS)
    return values_of(model)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("ranks", "shards"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3)])
def test_sync_equals_ddp_to_the_bit(ranks: int, shards: int, optimizer: str, shared: bool) -> None:
    wanted = run_ranks(lambda comm: by_ddp(comm, optimizer), ranks)[0]
    for found in run_ranks(lambda comm: by_server(comm, optimizer, shards=shards, shared=shared), ranks):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_schedules_and_groups_run_at_the_servers() -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        groups = [{"params": parameters[:2], "lr": 0.3}, {"params": parameters[2:], "momentum": 0.5}]
        return torch.optim.SGD(groups, lr=0.1)

    def schedule(stepper: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(stepper, [3, 7, 7], gamma=0.5)

    def body(comm: ringred.Communicator) -> list[Tensor]:
        model = make_model()
        with ParameterServer(model, optimizer, Sync(), schedule=schedule, comm=comm) as server:
            for batch in batches(0):
                server.pull()
                loss_of(model, batch).backward()
                server.push()
            server.pull()
        return values_of(model)

    model = make_model()
    stepper = optimizer(model.parameters())
    rates = schedule(stepper)
    for batch in batches(0):
        stepper.zero_grad()
        loss_of(model, batch).backward()
        stepper.step()
        rates.step()
    for found in run_ranks(body, 2):
        torch.testing.assert_close(found, values_of(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
@pytest.mark.parametrize(
    "policy",
    [
        "sync",
        "k_sync:2",
        "k_batch_sync:3",
        "k_async:2",
        "k_batch_async:3",
        "async",
        "soft_sync:2",
        "bounded_staleness:1",
    ],
)
def test_every_update_is_made_of_the_gradients_that_the_policy_counts(policy: str, shared: bool) -> None:
    """With gradients of one and a rate of one each update takes exactly one off, whoever made it."""
    updates, ranks = 30, 4

    def body(comm: ringred.Communicator) -> tuple[Tensor, Any]:
        weight = nn.Parameter(torch.full((700,), 1000.0))
        options = {"updates": updates, "shards": 3, "shared": shared, "comm": comm}
        with ParameterServer(
            [weight], lambda given: torch.optim.SGD(given, lr=1.0), parse(policy), **options
        ) as server:
            while server.pull():
                if server.sleep(0.001 * (1 + comm.rank)):
                    weight.grad = torch.ones(700)
                    server.push()
            report = server.report()
        return weight.detach().clone(), report

    found = run_ranks(body, ranks)
    size = {"sync": 4, "k_sync:2": 2, "k_batch_sync:3": 3, "k_async:2": 2, "k_batch_async:3": 3, "soft_sync:2": 2}
    for weight, report in found:
        assert report.updates == updates
        assert sum(report.applied.values()) == sum(report.staleness.values()) == updates * size.get(policy, 1)
        assert torch.equal(weight, torch.full((700,), 1000.0 - updates))
        if "sync" in policy.split("_")[-1] and "soft" not in policy and "async" not in policy:
            assert report.mean_staleness == 0


def test_no_sync_adds_gradients_up_and_a_push_clears_them() -> None:
    def body(comm: ringred.Communicator) -> list[Tensor]:
        model = make_model()
        with ParameterServer(model, OPTIMIZERS["sgd"], Sync(), comm=comm) as server:
            first, second, *_ = batches(comm.rank)
            server.pull()
            with server.no_sync():
                loss_of(model, first).backward()
            loss_of(model, second).backward()
            server.push()
            assert all(parameter.grad is None for parameter in model.parameters())
            server.pull()
        return values_of(model)

    model = make_model()
    stepper = OPTIMIZERS["sgd"](model.parameters())
    for rank in range(2):
        for batch in batches(rank)[:2]:
            (loss_of(model, batch) / 2).backward()
    stepper.step()
    for found in run_ranks(body, 2):
        torch.testing.assert_close(found, values_of(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compression", ["half", "bfloat16", "int8", "top_k:0.1"])
def test_compressed_gradients_train(compression: str) -> None:
    def body(comm: ringred.Communicator) -> tuple[float, float, int]:
        model = make_model()
        batch = batches(0)[0]
        before = loss_of(model, batch).item()
        options: dict[str, Any] = {"compression": compression, "updates": 60}
        with ParameterServer(model, OPTIMIZERS["sgd"], Sync(), comm=comm, **options) as server:
            while server.pull():
                loss_of(model, batch).backward()
                server.push()
            pushed = server.worker.bytes_pushed
        return before, loss_of(model, batch).item(), pushed

    whole = 60 * sum(value.nbytes for value in values_of(make_model()))
    parts = {"half": 0.5, "bfloat16": 0.5, "int8": 0.31, "top_k:0.1": 0.21}
    for before, after, pushed in run_ranks(body, 2):
        assert after < before / 3
        assert pushed <= parts[compression] * whole


def refused(kind: type[Exception], match: str, body: Callable[[ringred.Communicator], Any], ranks: int = 2) -> None:
    """Every rank raises it."""
    for failure in run_ranks(body, ranks, return_exceptions=True):
        assert isinstance(failure, kind), failure
        assert match in str(failure)


def start(comm: ringred.Communicator, policy: Any = None, optimizer: Any = None, **options: Any) -> ParameterServer:
    weight = options.pop("weight", nn.Parameter(torch.zeros(10)))
    return ParameterServer([weight], optimizer or OPTIMIZERS["sgd"], policy or Sync(), comm=comm, **options)


def test_wrong_arguments_are_refused_on_every_rank() -> None:
    refused(PolicyError, "KSync(3) needs 3 workers, and there are 2", lambda comm: start(comm, KSync(3)))
    refused(PolicyError, "5 shards in 2 ranks; expected 1 to 2", lambda comm: start(comm, shards=5))
    refused(
        PolicyError,
        "LBFGS is none",
        lambda comm: start(comm, optimizer=lambda parameters: torch.optim.LBFGS(parameters)),
    )
    refused(ValueError, "no parameter requires a gradient", lambda comm: ParameterServer([], OPTIMIZERS["sgd"]))
    refused(ValueError, "compression is one of raw, half", lambda comm: start(comm, compression="gzip"))


def test_workers_with_other_models_are_refused() -> None:
    def body(comm: ringred.Communicator) -> None:
        weight = nn.Parameter(torch.zeros(10 + comm.rank))
        with start(comm, weight=weight) as server:
            server.pull()
            weight.grad = torch.ones(10 + comm.rank)
            server.push()
            server.pull()

    refused, other = sorted(run_ranks(body, 2, return_exceptions=True), key=lambda it: not isinstance(it, PolicyError))
    assert isinstance(refused, PolicyError)
    assert "'parameter 0' is there: expected shape (1" in str(refused)
    assert isinstance(other, (TooFewWorkers, PeerFailed)), other
    assert "raised PolicyError" in str(other)


def test_too_few_workers_are_told_who_left_and_why() -> None:
    def body(comm: ringred.Communicator) -> None:
        weight = nn.Parameter(torch.zeros(10))
        with start(comm, Sync(), weight=weight) as server:
            server.pull()
            if comm.rank == 1:
                raise ZeroDivisionError("a bug of the user's")
            weight.grad = torch.ones(10)
            server.push()
            server.pull()

    first, second, third = run_ranks(body, 3, return_exceptions=True)
    assert isinstance(second, ZeroDivisionError)
    for failure in (first, third):
        assert isinstance(failure, TooFewWorkers), failure
        assert "Sync() needs 3 workers; worker 1 left, and 2 are there" in str(failure)
        assert "raised ZeroDivisionError: a bug of the user's" in str(failure)


def test_an_elastic_policy_goes_on_without_the_dead() -> None:
    def body(comm: ringred.Communicator) -> float:
        weight = nn.Parameter(torch.zeros(10))
        options = {"weight": weight, "updates": 20, "shards": 2}
        with start(comm, Sync(elastic=True), lambda given: torch.optim.SGD(given, lr=1.0), **options) as server:
            while server.pull():
                if comm.rank == 2 and server.version == 5:
                    raise ZeroDivisionError("a bug of the user's")
                weight.grad = torch.ones(10)
                server.push()
            return weight[0].item()

    first, second, third = run_ranks(body, 3, return_exceptions=True)
    assert isinstance(third, ZeroDivisionError)
    assert first == second == -20.0


def test_a_worker_that_does_not_push_lets_the_others_time_out() -> None:
    over = threading.Barrier(2)

    def body(comm: ringred.Communicator) -> str:
        weight = nn.Parameter(torch.zeros(10))
        with start(comm, Sync(), weight=weight) as server:
            server.pull()
            told = ""
            if comm.rank == 0:
                weight.grad = torch.ones(10)
                server.push()
                with pytest.raises(CollectiveTimeout, match=r"worker 0: Sync\(\) did not release it within 0.3 s"):
                    server.pull(timeout=0.3)
            over.wait(20)
            return told

    run_ranks(body, 2)


def test_gradients_of_another_size_are_refused() -> None:
    def body(comm: ringred.Communicator) -> None:
        with start(comm, KAsync(1)) as server:
            server.pull()
            worker = server.worker
            with pytest.raises(UnsupportedTensor, match="'parameter 0': expected 10 elements, got 11"):
                worker.push(worker.gradients(), {"parameter 0": torch.zeros(11)})
            with pytest.raises(PolicyError, match="there is no tensor 'x'; there are 'parameter 0'"):
                worker.push(worker.gradients(), {"x": torch.zeros(11)})

    run_ranks(body, 2)


@pytest.mark.parametrize("aware", ["mean", "per_gradient"])
def test_stale_gradients_count_for_less(aware: Any) -> None:
    """Async of four: a gradient that is a updates stale moves the weight by 1/max(1, a)."""

    def body(comm: ringred.Communicator) -> tuple[float, Any]:
        weight = nn.Parameter(torch.zeros(10, dtype=torch.float64))
        options = {"weight": weight, "updates": 40, "staleness_aware": aware}
        rate_one = lambda given: torch.optim.SGD(given, lr=1.0)  # noqa: E731
        with start(comm, KAsync(1), rate_one, **options) as server:
            while server.pull():
                server.sleep(0.002)
                weight.grad = torch.ones(10, dtype=torch.float64)
                server.push()
            return weight[0].item(), server.report()

    for weight, report in run_ranks(body, 4):
        if aware == "per_gradient":
            moved = sum(count / max(1, stale) for stale, count in report.staleness.items())
            assert weight == pytest.approx(-moved)
        else:
            assert -40 < weight < -40 / max(report.staleness)
            assert report.rate == pytest.approx(1 / max(1.0, report.mean_staleness))


def test_the_trace_has_pulls_pushes_and_the_staleness_of_each_update(tmp_path: Path) -> None:
    def body(comm: ringred.Communicator) -> Any:
        model = make_model()
        comm.start_trace(str(tmp_path / "trace.json"))
        with ParameterServer(model, OPTIMIZERS["sgd"], Async(), comm=comm) as server:
            for batch in batches(comm.rank)[:5]:
                server.pull()
                loss_of(model, batch).backward()
                server.push()
            server.pull()
            return server.report() if comm.rank == 0 else None

    report = run_ranks(body, 2)[0]
    first, second = (json.loads((tmp_path / f"trace.rank{rank}.json").read_text()) for rank in (0, 1))
    for trace in (first, second):
        names = [event["name"] for event in trace["traceEvents"]]
        assert names.count("pull") == 6
        assert names.count("push") == 5
    updates = [event["args"]["staleness"] for event in first["traceEvents"] if event["name"].startswith("update ")]
    counted = Counter(stale for update in updates for stale in update.values())
    assert len(updates) == 10
    assert counted == report.staleness or sum(report.staleness.values()) < 10
