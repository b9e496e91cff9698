"""Keys and values on a parameter server: what pushes come to, clocks, handles, and every wrong call."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import ringred
from ringred.errors import CollectiveTimeout, PolicyError, UnsupportedTensor
from ringred.parameter_server import store as store_module
from ringred.parameter_server.policies import Async, KAsync, Sync
from ringred.parameter_server.store import Store
from ringred.testing import run_ranks


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sync_pushes_are_averaged_and_added(dtype: torch.dtype, shared: bool) -> None:
    def body(comm: ringred.Communicator) -> None:
        with Store("add", Sync(), comm=comm, shared=shared) as store:
            store.init({"a": torch.zeros(3, 5, dtype=dtype), "b": torch.ones(100, dtype=dtype)})
            store.init("empty", torch.zeros(0, 4, dtype=dtype))
            a, b, empty = (torch.empty(s, dtype=dtype) for s in ((3, 5), (100,), (0, 4)))
            assert store.pull(["b", "a", "empty"], [b, a, empty]) == 0
            for step in range(1, 4):
                pushed = torch.full((3, 5), float(2 * comm.rank), dtype=dtype)
                store.push(["a", "b"], [pushed, torch.full((100,), -1.0, dtype=dtype)])
                assert store.pull(["a", "b"], [a, b]) == step
                assert torch.equal(a, torch.full((3, 5), float(step), dtype=dtype))
                assert torch.equal(b, torch.full((100,), 1.0 - step, dtype=dtype))
            store.push("a", torch.ones(3, 5, dtype=dtype))  # b is in nobody's push: it stays
            assert store.pull("b", b) == 4
            assert torch.equal(b, torch.full((100,), -2.0, dtype=dtype))

    run_ranks(body, 2)


def test_a_key_that_only_some_push_gets_the_mean_over_all() -> None:
    def body(comm: ringred.Communicator) -> None:
        with Store("add", Sync(), comm=comm) as store:
            store.init({"a": torch.zeros(7), "b": torch.zeros(7)})
            store.push("a" if comm.rank else "b", torch.ones(7))
            got = torch.empty(7)
            store.pull("a", got)
            assert torch.equal(got, torch.full((7,), 0.5))

    run_ranks(body, 2)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
def test_assign_and_an_optimizer(shared: bool) -> None:
    def body(comm: ringred.Communicator) -> None:
        got = torch.empty(10)
        with Store("assign", Sync(), comm=comm, shared=shared) as store:
            store.init("a", torch.zeros(10))
            store.push("a", torch.arange(10.0))
            store.pull("a", got)
            assert torch.equal(got, torch.arange(10.0))
        with Store(lambda given: torch.optim.SGD(given, lr=0.5), Sync(), comm=comm, shared=shared) as store:
            store.init("a", torch.zeros(10))
            store.push("a", torch.arange(10.0))
            store.pull("a", got)
            assert torch.equal(got, -torch.arange(10.0) / 2)

    run_ranks(body, 3)


def test_a_pull_waits_for_the_clock_that_it_asks_for() -> None:
    pushed = threading.Event()

    def body(comm: ringred.Communicator) -> None:
        got = torch.empty(10)
        with Store("add", Async(), comm=comm) as store:
            store.init("a", torch.zeros(10))
            if comm.rank == 0:
                with pytest.raises(CollectiveTimeout, match=r"worker 0: shard \d did not reach version 3, it is at 0"):
                    store.pull("a", got, min_clock=3, timeout=0.1)
                pushed.set()
                assert store.pull("a", got, min_clock=3) >= 3
                assert torch.equal(got, torch.full((10,), 3.0))
            else:
                pushed.wait(20)
                for _ in range(3):
                    store.push("a", torch.ones(10))

    run_ranks(body, 2)


def test_handles_end_by_themselves_at_the_next_call() -> None:
    def body(comm: ringred.Communicator) -> None:
        with Store("add", KAsync(1), comm=comm) as store:
            store.init("a", torch.zeros(10))
            pushed = store.push("a", torch.ones(10), async_op=True)
            got = torch.empty(10)
            pulling = store.pull("a", got, async_op=True)
            assert pushed.wait() == 0
            clock = pulling.wait()
            assert clock >= 1
            assert torch.equal(got, torch.full((10,), float(clock)))
            store.push("a", torch.ones(10), async_op=True)
        assert store is not None

    run_ranks(body, 1)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
def test_pulls_are_on_their_way_together_and_the_highest_priority_comes_first(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_WINDOW", 4 * 1000)

    def body(comm: ringred.Communicator) -> None:
        names = ["a", "b", "c", "d"]
        with Store("add", Sync(), comm=comm, shared=shared) as store:
            store.init({name: torch.zeros(1000) for name in names})
            store.push(names, [torch.ones(1000)] * 4)
            got = {name: torch.empty(1000) for name in names}
            store.pull("a", got["a"])
            started, start = [], store.worker.start

            def told(targets: Any, least: int) -> Any:
                first = min(target.part.data_ptr() for parts in targets.by_shard.values() for target in parts)
                started.append(next(name for name in names if got[name].data_ptr() == first))
                return start(targets, least)

            store.worker.start = told  # type: ignore[method-assign]
            priorities = {"a": 0, "b": 1, "c": 3, "d": 2}
            asked = {name: store.pull(name, got[name], async_op=True, priority=priorities[name]) for name in names}
            assert started == ["a"], "as many as the window takes are on their way"
            for name in ("a", "c", "d"):
                assert asked[name].wait() == 1
            assert started == ["a", "c", "d", "b"]
            store.push("a", torch.ones(1000))  # ends what is open
            assert all(torch.equal(value, torch.ones(1000)) for value in got.values())
            store.worker.start = start  # type: ignore[method-assign]

    run_ranks(body, 2)


def test_a_push_is_computed_at_the_oldest_of_what_was_pulled() -> None:
    def body(comm: ringred.Communicator) -> None:
        with Store("add", KAsync(1), comm=comm) as store:
            store.init({"a": torch.zeros(3), "b": torch.zeros(3)})
            out = torch.empty(3)
            store.pull("a", out)
            store.push("a", torch.ones(3))
            first = store.pull("a", out)
            assert first == 1
            assert store.push("a", torch.ones(3)).wait() == 1
            store.pull("b", out, min_clock=2)
            assert store.push("a", torch.ones(3), clock=0).wait() == 0
            assert store.report().staleness == {0: 2, 2: 1}

    run_ranks(body, 1)


def raised(body: Any, ranks: int = 1) -> list[BaseException]:
    return run_ranks(body, ranks, return_exceptions=True)


def test_wrong_calls_say_what_was_expected() -> None:
    def body(comm: ringred.Communicator) -> None:
        with Store("add", comm=comm) as store:
            store.init("a", torch.zeros(2, 3))
            with pytest.raises(PolicyError, match="worker 0: push: unknown key 'b'; there are 'a'"):
                store.push("b", torch.zeros(2, 3))
            with pytest.raises(UnsupportedTensor, match=r"push 'a': expected \(2, 3\) of torch.float32, got \(6,\)"):
                store.push("a", torch.zeros(6))
            with pytest.raises(UnsupportedTensor, match=r"pull 'a': expected .* got \(2, 3\) of torch.float64"):
                store.pull("a", torch.zeros(2, 3, dtype=torch.float64))
            with pytest.raises(PolicyError, match="2 keys and 1 tensors"):
                store.pull(["a", "a"], [torch.zeros(2, 3)])
            with pytest.raises(PolicyError, match="'a' is there already, with other values"):
                store.init("a", torch.ones(2, 3))
            with pytest.raises(PolicyError, match=r"'a' is there: expected shape \(2, 3\), dtype float32"):
                store.init("a", torch.zeros(2, 4))
            with pytest.raises(PolicyError, match="at version 9; expected 0 to 0, the version of now"):
                store.push("a", torch.zeros(2, 3), clock=9)
            store.init("a", torch.zeros(2, 3))
        with pytest.raises(ringred.RingredError, match="is closed"):
            store.pull("a", torch.zeros(2, 3))
        with Store("multiply", comm=comm) as store, pytest.raises(PolicyError, match="the rule is 'add', 'assign' or"):
            store.init("a", torch.zeros(1))

    assert raised(body) == [None]


def test_numbers_that_have_no_mean_and_hosts_as_workers_are_refused() -> None:
    def body(comm: ringred.Communicator) -> None:
        with Store("add", comm=comm) as store, pytest.raises(UnsupportedTensor, match="'a': expected a floating-point"):
            store.init("a", torch.zeros(3, dtype=torch.int64))
        with pytest.raises(PolicyError, match="a store is flat"):
            Store("add", comm=comm, hierarchy="host")

    run_ranks(body, 1)


def test_a_key_that_workers_give_other_values_is_refused() -> None:
    def body(comm: ringred.Communicator) -> str:
        with Store("add", comm=comm) as store:
            try:
                store.init("a", torch.full((4,), float(comm.rank)))
            except PolicyError as failure:
                return str(failure)
            return ""

    said = sorted(run_ranks(body, 3))
    assert said[0] == ""
    assert all("'a' is there already, with other values" in text for text in said[1:])
