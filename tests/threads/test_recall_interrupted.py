"""Calls that are recalled, and what comes between: signals, Ctrl-C, other threads, Python that torch runs, a trace."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ringred import native
from ringred.communicator import Communicator
from ringred.errors import PeerFailed
from ringred.testing import run_ranks

pytestmark = pytest.mark.skipif(native.player is None, reason=f"no compiled player: {native.reason}")

BOTH = pytest.mark.parametrize("transport", ["shm", "shm:python"])


class Asked(TorchFunctionMode):
    """Calls `then`, once, when torch is asked whether a tensor is a negative view."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__()
        self.then: Callable[[], object] | None = then

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        then = self.then
        if then is not None and getattr(function, "__name__", "") == "is_neg":
            self.then = None
            then()
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def first_of_two(transport: str, other: Callable[[Communicator], object]) -> Iterator[tuple[Communicator, list[Any]]]:
    """This thread, to which signals come, is rank 0 within; rank 1 runs `other`, and the list has what became of it."""
    ends: queue.Queue[Communicator] = queue.Queue()
    done, became = threading.Event(), list[Any]()

    def body(comm: Communicator) -> object:
        if comm.rank:
            return other(comm)
        ends.put(comm)
        return done.wait(30)

    def ranks() -> None:
        became.extend(run_ranks(body, 2, transport, timeout=10, return_exceptions=True)[1:])

    thread = threading.Thread(target=ranks)
    thread.start()
    try:
        yield ends.get(timeout=30), became
    finally:
        done.set()
        thread.join()


def at_once(comm: Communicator, call: Callable[[], object]) -> None:
    """Makes `call`, and sends this thread a signal as soon as it is counted, while it still looks for the peer."""
    begun, main = comm.runner.recall.number, threading.get_ident()

    def fire() -> None:
        while comm.runner.recall.number == begun:
            pass
        signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=fire)
    thread.start()
    time.sleep(0.01)  # it watches the number before the call begins
    try:
        call()
    finally:
        thread.join()


@contextlib.contextmanager
def on_signal(handler: Callable[[int, object], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def late(tensor: Tensor, told: threading.Event, then: bool = False) -> Callable[[Communicator], list[float]]:
    """What a rank does that comes to the fourth call once it is told, and `then` to another."""

    def other(comm: Communicator) -> list[float]:
        for _ in range(3):
            comm.all_reduce(tensor)
        told.wait(30)
        tensor.fill_(100.0)
        comm.all_reduce(tensor)
        if then:
            comm.barrier()
        return tensor.tolist()

    return other


@BOTH
def test_a_signal_handler_may_not_call_in_the_middle_of_a_recalled_call(transport: str) -> None:
    tensor, said, told = torch.zeros(4), list[str](), threading.Event()
    with first_of_two(transport, late(torch.zeros(4), told)) as (comm, became):
        for _ in range(3):
            comm.all_reduce(tensor)

        def handler(number: int, frame: object) -> None:
            try:
                comm.all_reduce(tensor)
            except Exception as failure:
                said.append(str(failure))
            told.set()

        tensor.fill_(10.0)
        with on_signal(handler):
            at_once(comm, lambda: comm.all_reduce(tensor))
    assert tensor.tolist() == [110.0] * 4
    assert became == [[110.0] * 4]
    (text,) = said
    assert "called in the middle of all_reduce #4" in text


@BOTH
def test_ctrl_c_in_a_recalled_call_ends_it_on_every_rank(transport: str) -> None:
    tensor, told = torch.zeros(4), threading.Event()

    def handler(number: int, frame: object) -> None:
        told.set()
        raise KeyboardInterrupt

    with first_of_two(transport, late(torch.zeros(4), told, then=True)) as (comm, became):  # its data may be there
        for _ in range(3):
            comm.all_reduce(tensor)
        with on_signal(handler), pytest.raises(KeyboardInterrupt):
            at_once(comm, lambda: comm.all_reduce(tensor))
        assert comm.runner.failed
        with pytest.raises(PeerFailed, match=r"unusable since an earlier failure.*KeyboardInterrupt"):
            comm.all_reduce(tensor)
    (failure,) = became
    assert isinstance(failure, PeerFailed)
    assert "rank 0 raised KeyboardInterrupt" in str(failure)


@BOTH
def test_ctrl_c_while_torch_is_asked_is_not_lost(transport: str) -> None:
    def body(comm: Communicator) -> list[float]:
        def interrupt() -> None:
            raise KeyboardInterrupt

        tensor = torch.ones(4)
        for _ in range(2):
            comm.all_reduce(tensor)
        with pytest.raises(KeyboardInterrupt), Asked(interrupt):
            comm.all_reduce(tensor)
        comm.all_reduce(tensor)
        return tensor.tolist()

    assert run_ranks(body, 2, transport) == [[8.0] * 4] * 2


@BOTH
def test_a_call_that_python_begins_while_torch_is_asked_comes_first(transport: str) -> None:
    def body(comm: Communicator) -> list[float]:
        tensor, large = torch.ones(4), torch.ones(3_000_000)
        for _ in range(2):
            comm.all_reduce(tensor)
        works: list[Any] = []
        with Asked(lambda: works.append(comm.all_reduce(large, async_op=True))):
            comm.all_reduce(tensor)
        works[0].wait()
        return [*tensor.tolist(), *large.unique().tolist()]

    assert run_ranks(body, 2, transport) == [[8.0] * 4 + [2.0]] * 2


class Several(list[Tensor]):
    pass


Pair = namedtuple("Pair", "first second")


@BOTH
def test_lists_and_tuples_of_other_classes_are_looked_into(transport: str) -> None:
    def body(comm: Communicator) -> list[object]:
        several, pair = Several([torch.zeros(2), torch.zeros(2)]), Pair(torch.zeros(2), torch.zeros(2))
        mine, seen = torch.full((2,), comm.rank + 1.0), list[object]()
        for _ in range(3):
            comm.all_gather(several, mine)
            comm.all_gather(pair, mine)
            seen.append([tensor.tolist() for tensor in (*several, *pair)])
            several[0], pair.first.data = torch.zeros(2), torch.zeros(2)
        return seen

    assert run_ranks(body, 2, transport) == [[[[1.0, 1.0], [2.0, 2.0]] * 2] * 3] * 2


@BOTH
def test_a_list_that_changes_while_its_first_call_waits_is_another_call(transport: str) -> None:
    def body(comm: Communicator) -> list[object]:
        before = [torch.zeros(2), torch.zeros(2)]
        after = [torch.zeros(2), torch.zeros(2)]
        outputs, mine = list(before), torch.full((2,), comm.rank + 1.0)

        def change() -> None:
            outputs[:] = after

        timer = threading.Timer(0.1, change)
        timer.start()
        time.sleep(0.3 * comm.rank)  # rank 0 waits in its call when the list changes
        comm.all_gather(list(before) if comm.rank else outputs, mine)
        timer.join()
        for _ in range(2):
            comm.all_gather(outputs, mine)
        return [tensor.tolist() for tensor in after]

    assert run_ranks(body, 2, transport) == [[[1.0, 1.0], [2.0, 2.0]]] * 2


@BOTH
def test_a_first_call_that_is_done_does_not_wait_for_another_thread_s(transport: str) -> None:
    def body(comm: Communicator) -> bool:
        """Rank 1 comes to the second call only when rank 0's first one has returned."""
        if comm.rank == 0:
            for done in returned:
                first = threading.Thread(target=first_call, args=(comm, done))
                first.start()
                while first.is_alive() and not comm.runner.doings.current:
                    pass
                comm.barrier()
                first.join()
            return True
        for done in returned:
            comm.all_reduce(torch.ones(64))
            done.wait(20)
            comm.barrier()
        return True

    def first_call(comm: Communicator, done: threading.Event) -> None:
        comm.all_reduce(torch.ones(64))
        done.set()

    returned = [threading.Event() for _ in range(30)]
    assert run_ranks(body, 2, transport, timeout=10) == [True, True]


@BOTH
def test_only_what_this_rank_has_sent_is_remembered_as_left(transport: str) -> None:
    def body(comm: Communicator) -> list[str]:
        ours, theirs, nothing = torch.ones(4), torch.ones(4), torch.ones(0)
        seen = set()
        for _ in range(100):
            comm.all_reduce(ours)
            for root in (0, 1, 0, 1):
                comm.broadcast(ours if root else theirs, root)
                comm.broadcast(nothing, root)
            seen |= {call.text for _, call, _, _ in comm.runner.doings._one_way}
        return sorted(seen)

    for rank, texts in enumerate(run_ranks(body, 2, transport)):
        assert all(f"root {rank}" in text and "4 elements" in text for text in texts), texts
        assert texts


def test_a_trace_that_begins_while_a_recalled_call_waits_has_no_span_from_before(tmp_path: Path) -> None:
    def body(comm: Communicator) -> bool:
        tensor = torch.ones(4)
        for _ in range(2):
            comm.all_reduce(tensor, algorithm="ring")
        comm.barrier()
        timer = threading.Timer(0.1, lambda: comm.start_trace(str(tmp_path / "trace.json")))
        timer.start()
        time.sleep(0.3 * comm.rank)  # rank 0 waits in its call when the trace begins
        began = time.time() * 1e6
        comm.all_reduce(tensor, algorithm="ring")
        timer.join()
        tracer = comm.tracer
        assert tracer is not None
        return all(abs(event["ts"] - began) < 60e6 for event in tracer.events if "ts" in event)

    assert run_ranks(body, 3, "shm") == [True] * 3
