"""Calls that are made again: which are recalled without Python, that they do the same, and what ends that."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ringred import native
from ringred.communicator import Communicator
from ringred.errors import CollectiveMismatch, PeerFailed
from ringred.runtime.doing import Doing
from ringred.runtime.folds import SUPPORTED
from ringred.testing import run_ranks

pytestmark = pytest.mark.skipif(native.player is None, reason=f"no compiled player: {native.reason}")

BOTH = pytest.mark.parametrize("transport", ["shm", "shm:python"])


@pytest.fixture(params=["DLPack", "methods"])
def telling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How torch tells what a tensor is: by its table of functions for it, or by methods, where it has no table."""
    if request.param == "methods":
        monkeypatch.delattr(Tensor, "__dlpack_c_exchange_api__", raising=False)


@contextmanager
def counted(comm: Communicator) -> Iterator[list[bool]]:
    """Whether each call within was recalled."""
    runner: Any = comm.runner
    recall, told = runner.recall, list[bool]()

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(recall, name)

        def __setattr__(self, name: str, value: object) -> None:
            setattr(recall, name, value)

        def play(self, *what: object) -> bool:
            told.append(recall.play(*what))
            return told[-1]

    runner.recall = Counting()
    try:
        yield told
    finally:
        runner.recall = recall


def each_collective(comm: Communicator) -> list[Callable[[], object]]:
    whole, share = torch.arange(6.0) + comm.rank, torch.ones(6 // comm.size)
    parts = [torch.ones(2) * comm.rank for _ in range(comm.size)]
    others = [torch.zeros(2) for _ in range(comm.size)]
    return [
        lambda: comm.all_reduce(whole),
        lambda: comm.all_reduce(whole, "max", algorithm="ring"),
        lambda: comm.reduce_scatter(share, whole),
        lambda: comm.all_gather(whole, share),
        lambda: comm.all_gather(others, parts[0]),
        lambda: comm.all_to_all(others, parts),
        lambda: comm.broadcast(whole, 1),
        lambda: comm.reduce(whole),
        lambda: comm.gather(share, whole if comm.rank == 0 else None),
        lambda: comm.scatter(share, whole if comm.rank == 0 else None),
        lambda: comm.send(share, 1) if comm.rank == 0 else comm.recv(share, 0) if comm.rank == 1 else comm,
        comm.barrier,
    ]


@pytest.mark.usefixtures("telling")
def test_every_collective_is_recalled_from_the_second_time_on() -> None:
    def body(comm: Communicator) -> list[bool]:
        calls = each_collective(comm)
        for call in calls:
            call()
        with counted(comm) as told:
            for _ in range(3):
                for call in calls:
                    call()
        return told

    assert run_ranks(body, 2, "shm") == [[True] * 36] * 2
    assert run_ranks(body, 2, "shm:python") == [[False] * 36] * 2


@BOTH
def test_calls_that_are_recalled_do_the_same_and_are_counted_alike(transport: str) -> None:
    def body(comm: Communicator) -> tuple[list[float], object]:
        seen: list[float] = []
        tensor = torch.zeros(6)
        for turn in range(5):
            tensor.copy_(torch.arange(6.0) * (comm.rank + turn))
            for call in each_collective(comm):
                call()
            comm.all_reduce(tensor, "avg")
            comm.broadcast(tensor, turn % comm.size)
            seen += tensor.tolist()
        comm.barrier()
        return seen, comm.runner.doings.seen()[1]._replace(site="")

    assert run_ranks(body, 3, transport) == run_ranks(body, 3, "local")


def test_torch_is_asked_for_what_its_table_does_not_tell() -> None:
    class Seen(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    names: list[str] = []

    def body(comm: Communicator) -> None:
        numbers, pairs = torch.zeros(4), torch.zeros(4, dtype=torch.complex64)
        for _ in range(2):
            comm.all_reduce(numbers)
            comm.all_reduce(pairs)
        with Seen() if comm.rank else nullcontext():
            comm.all_reduce(numbers)
            comm.all_reduce(pairs)

    run_ranks(body, 2, "shm")
    assert names == ["is_neg", "is_neg", "is_conj"]


@pytest.mark.usefixtures("telling")
def test_every_dtype_is_recalled_and_is_another_call_at_the_same_address() -> None:
    def body(comm: Communicator) -> tuple[list[bool], list[bool]]:
        memory = torch.empty(64, dtype=torch.uint8)
        views = [memory.view(dtype) for dtype in SUPPORTED]
        seen: list[bool] = []
        with counted(comm) as told:
            for view in (*views, *views):
                comm.all_reduce(view.fill_(comm.rank))
                seen.append(bool((view == 1).all()))
        return seen, told

    kinds = len(SUPPORTED)
    assert run_ranks(body, 2, "shm") == [([True] * 2 * kinds, [False] * kinds + [True] * kinds)] * 2


@pytest.mark.usefixtures("telling")
@BOTH
def test_memory_at_the_same_address_that_means_something_else_is_another_call(transport: str) -> None:
    def body(comm: Communicator) -> list[object]:
        base = torch.ones(4, 4)
        numbers = torch.ones(4, 4, dtype=torch.complex64)
        views: list[Tensor] = [
            base,
            base.t(),
            base[:2],
            base[:, :2],
            base.view(torch.int32),
            torch._neg_view(base),
            torch.nn.Parameter(base, requires_grad=False),
            base.expand(4, 4),
            numbers,
            numbers.conj(),
            numbers.real,
        ]
        seen: list[object] = []
        for _ in range(3):
            base.copy_(torch.arange(16.0).view(4, 4) + comm.rank)
            numbers.copy_(torch.complex(base, -base))
            for view in views:
                comm.all_reduce(view)
                seen.append((base.tolist(), numbers.tolist()))
                base.remainder_(7.0)
        return seen

    assert run_ranks(body, 2, transport) == run_ranks(body, 2, "local")


@BOTH
def test_a_list_that_changed_is_another_call(transport: str) -> None:
    def body(comm: Communicator) -> list[object]:
        tensors = [torch.full((3,), float(rank)) for rank in range(comm.size)]
        more, mine = [torch.zeros(3) for _ in range(comm.size)], torch.full((3,), comm.rank + 1.0)
        seen: list[object] = []
        for turn in range(6):
            if turn == 3:
                tensors[0], tensors[1] = tensors[1], more[0]
            comm.all_gather(tensors, mine)
            seen.append([tensor.tolist() for tensor in (*tensors, *more)])
        return seen

    assert run_ranks(body, 2, transport) == run_ranks(body, 2, "local")


@BOTH
def test_calls_with_more_copies_than_are_kept_make_them_every_time(transport: str) -> None:
    def body(comm: Communicator) -> list[float]:
        tensor, seen = torch.zeros(700_000), list[float]()
        for turn in range(4):
            tensor.fill_(comm.rank + turn)
            comm.reduce(tensor)
            seen += tensor.unique().tolist()
        return seen

    assert run_ranks(body, 2, transport) == run_ranks(body, 2, "local")


@BOTH
def test_more_calls_than_there_are_places_for(transport: str) -> None:
    def body(comm: Communicator) -> set[float]:
        tensors = [torch.zeros(4) for _ in range(700)]
        seen = set()
        for turn in range(3):
            for tensor in tensors:
                tensor.fill_(comm.rank + turn)
                comm.all_reduce(tensor)
                seen |= set(tensor.tolist())
        return seen

    assert run_ranks(body, 2, transport, timeout=30) == [{1.0, 3.0, 5.0}] * 2


@pytest.mark.usefixtures("telling")
def test_a_hundred_calls_are_all_recalled() -> None:
    def body(comm: Communicator) -> list[bool]:
        tensors = [torch.zeros(4) for _ in range(100)]
        for tensor in tensors:
            comm.all_reduce(tensor)
        with counted(comm) as told:
            for tensor in tensors:
                comm.all_reduce(tensor)
        return told

    assert run_ranks(body, 2, "shm") == [[True] * 100] * 2


@BOTH
def test_asynchronous_calls_between_them_keep_their_order(transport: str) -> None:
    def body(comm: Communicator) -> list[float]:
        one, other, seen = torch.ones(3), torch.ones(100_000), list[float]()
        for turn in range(20):
            one.fill_(turn)
            comm.all_reduce(one)
            work = comm.all_reduce(other, "max", async_op=True)
            comm.all_reduce(one)
            comm.broadcast(one, turn % comm.size)
            assert work is not None
            work.wait()
            seen.append(one.sum().item())
        return seen

    assert run_ranks(body, 2, transport) == run_ranks(body, 2, "local")


def test_new_costs_a_trace_and_a_purpose_end_it(tmp_path: Path) -> None:
    def body(comm: Communicator) -> list[bool]:
        tensor = torch.ones(4)

        def recalled() -> bool:
            with counted(comm) as told:
                comm.all_reduce(tensor)
            return told[-1]

        said = [recalled(), recalled()]
        comm.tune({})
        said += [recalled(), recalled()]
        with comm.for_purpose("a test"):
            said.append(recalled())
        said += [recalled(), recalled()]
        comm.start_trace(str(tmp_path / "trace.json"))
        said.append(recalled())
        comm.runner.tracer = None
        said += [recalled(), recalled()]
        return said

    assert run_ranks(body, 2, "shm") == [[False, True, False, True, False, False, True, False, False, True]] * 2


@BOTH
def test_a_recalled_call_that_differs_says_where(transport: str) -> None:
    def body(comm: Communicator) -> None:
        mine, other = torch.ones(4), torch.ones(5)
        for _ in range(3):
            comm.all_reduce(mine)
            comm.all_reduce(other)
        comm.all_reduce(mine if comm.rank else other)

    for failure in run_ranks(body, 2, transport, timeout=10, return_exceptions=True):
        assert isinstance(failure, CollectiveMismatch), failure
        assert "rank 0 all_reduce #7 (sum, float32, 5 elements" in str(failure)
        assert "rank 1 all_reduce #7 (sum, float32, 4 elements" in str(failure)
        assert str(failure).count("test_recall.py:") >= 2


@BOTH
def test_a_broadcast_that_was_left_is_named_where_the_others_made_another_call(transport: str) -> None:
    def body(comm: Communicator) -> None:
        tensor = torch.ones(3)
        for _ in range(3):
            comm.broadcast(tensor)
            comm.all_reduce(tensor)
        if comm.rank == 0:
            comm.broadcast(tensor)
        comm.all_reduce(tensor)
        comm.barrier()

    failure = run_ranks(body, 2, transport, timeout=10, return_exceptions=True)[0]
    assert isinstance(failure, CollectiveMismatch)
    assert "rank 0 broadcast #7 (float32, 3 elements, root 0" in str(failure)
    assert "rank 1 all_reduce #7" in str(failure)


@BOTH
def test_nothing_is_recalled_after_abort_and_close(transport: str) -> None:
    def body(comm: Communicator) -> list[str]:
        tensor, said = torch.ones(4), list[str]()
        part = comm.duplicate()
        for _ in range(3):
            comm.all_reduce(tensor)
            part.all_reduce(tensor)
        part.close()
        comm.abort(ValueError("enough"))
        for one in (comm, part):
            with pytest.raises(PeerFailed) as failure:
                one.all_reduce(tensor)
            said.append(str(failure.value))
        return said

    for rank, (aborted, closed) in enumerate(run_ranks(body, 2, transport, timeout=10)):
        assert f"rank {rank}: all_reduce" in aborted
        assert "enough" in aborted
        assert "is closed" in closed


@BOTH
def test_a_rank_that_comes_late_is_waited_for_and_told_of(transport: str) -> None:
    def body(comm: Communicator) -> tuple[float, list[tuple[Doing, bool]]]:
        tensor, told = torch.zeros(2), list[tuple[Doing, bool]]()
        for turn in range(4):
            tensor.fill_(turn)
            time.sleep(0.05 * ((comm.rank + turn) % comm.size))  # each is the first, and waits, in its turn
            comm.all_reduce(tensor)
            told.append(comm.runner.doings.seen()[1:])
        return tensor.sum().item(), told

    for total, told in run_ranks(body, 3, transport):
        assert total == 18.0
        for number, (doing, under_way) in enumerate(told, start=1):
            assert (doing.number, under_way) == (number, False)
            assert doing.text.startswith(f"all_reduce #{number} (sum")


def test_a_communicator_goes_with_what_it_remembers() -> None:
    def body(comm: Communicator) -> bool:
        part = comm.duplicate()
        tensor = torch.ones(4)
        part.all_reduce(tensor)
        part.all_reduce(tensor)
        part.close()
        gone = weakref.ref(part.runner)
        del part
        until = time.monotonic() + 10
        while gone() is not None and time.monotonic() < until:  # while another thread collects, this does nothing
            gc.collect()
            time.sleep(0.01)
        return gone() is None

    assert run_ranks(body, 2, "shm") == [True, True]


def test_arguments_that_no_call_has_are_refused() -> None:
    assert native.player is not None
    recall = native.player.Recall(None, 0, bool, bool, Tensor, (), None, bool, bool, bool, 1)
    assert recall.play(print, torch.ones(3)) is False
    for wrong in ((), (None, None, "here", 0, 0, False, ()), (None, None, 0, 0, 0, False, [])):
        with pytest.raises(TypeError):
            recall.keep(*wrong)
    with pytest.raises(TypeError):
        native.player.Recall()
    recall.keep(None, None, 0, 0, 0, False, (print, 1 << 80))
    recall.keep(None, None, 0, 0, 0, False, tuple(range(1000)))
