"""The compiled player against the Python executor, which is its reference: bits, counters, traces, errors, signals."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ringred import native
from ringred.collectives.registry import algorithms
from ringred.communicator import Communicator
from ringred.errors import CollectiveTimeout
from ringred.runtime.folds import SUPPORTED, Folder, ReduceOp
from ringred.runtime.tape import kernel
from ringred.testing import run_ranks
from ringred.transports import links, shm_player
from ringred.transports.shm import ShmTransport

pytestmark = pytest.mark.skipif(native.player is None, reason=f"no compiled player: {native.reason}")

FOLDS = [(dtype, op) for dtype, ops in SUPPORTED.items() for op in sorted(ops, key=lambda op: op.value)]
LENGTHS = (0, 1, 7, 16, 33, 511, 513, 1100)


def test_the_player_and_python_agree_on_what_lies_where() -> None:
    assert shm_player.unusable() is None
    assert native.player is not None
    assert native.player.layout() == links.LAYOUT


# ---------------------------------------------------------------------- folds


def specials(dtype: torch.dtype) -> list[float]:
    """What rounding, overflow and comparison treat in a way of its own."""
    if not dtype.is_floating_point:
        return []
    limits = torch.finfo(dtype)
    finite = [0.0, limits.max, limits.tiny, limits.smallest_normal / 2, limits.eps, 1.0, 1.0 + limits.eps, 65504, 65520]
    return [*finite, *(-value for value in finite), float("inf"), -float("inf"), float("nan")]


def operand(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Any bits of the dtype, with specials among them."""
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=draw).bool()
    if dtype.is_complex:
        parts = operand(torch.float32 if dtype == torch.complex64 else torch.float64, 2 * count, seed)
        # torch adds complex numbers by way of a product with 1 + 0j, which leaves a NaN beside each infinity.
        return parts.where(parts.isfinite(), 1.5).view(dtype)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, (count,), generator=draw, dtype=dtype)
    values = torch.randn(count, generator=draw, dtype=torch.float64) * 10.0 ** torch.randint(
        -6, 5, (count,), generator=draw
    )
    special = specials(dtype)
    places = torch.rand(count, generator=draw) < 0.2
    values[places] = torch.tensor(special).double()[
        torch.randint(0, len(special), (int(places.sum()),), generator=draw)
    ]
    return values.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """Bits that must be equal. A NaN has one pattern here, and so has a zero of a complex number: torch adds those by
    way of a product."""
    tensor = torch.view_as_real(tensor) + 0 if tensor.is_complex() else tensor
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize(("dtype", "op"), FOLDS, ids=lambda value: str(getattr(value, "value", value)))
def test_folds_have_the_bits_of_torch(dtype: torch.dtype, op: ReduceOp, count: int, level: int) -> None:
    """Every length and alignment, with the result in place of an operand or not."""
    folder = Folder(op, dtype, count)
    found = kernel(folder, level)
    if found is None:
        assert dtype.is_complex, "the rest is compiled"
        return
    address, parts = found
    assert native.player is not None
    for length, shift in itertools.product(LENGTHS, (0, 1)):
        room = [operand(dtype, length + shift, 100 * length + k) for k in range(count)]
        operands = [each[shift:] for each in room]
        for own in (None, 0, count - 1):
            for final in (False, True):
                mine = [each.clone() for each in room]
                views = [each[shift:] for each in mine]
                out = torch.empty(length, dtype=dtype) if own is None else views[own]
                addresses = [view.data_ptr() for view in views]
                divisor = folder.divisor(final)
                native.player.fold(address, divisor, length * parts, out.data_ptr(), *addresses)
                expected = torch.empty(length, dtype=dtype)
                folder(expected, operands, final)
                if op in (ReduceOp.MIN, ReduceOp.MAX):  # of equal zeros either may be kept
                    out, expected = out + 0, expected + 0
                assert torch.equal(bits(out), bits(expected)), f"{length} elements, shift {shift}, own {own}"


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_sum_of_a_16_bit_number_and_some_others_is_rounded_as_torch_does(dtype: torch.dtype, level: int) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    folder = Folder(ReduceOp.SUM, dtype, 2)
    found = kernel(folder, level)
    assert found is not None
    assert native.player is not None
    others = [*specials(dtype), 0.1, -0.3, 1e-4, 3.14, 1e3]
    for other in others:
        operand = torch.full((1 << 16,), other).to(dtype)
        out, expected = torch.empty_like(every), torch.empty_like(every)
        native.player.fold(found[0], 0, 1 << 16, out.data_ptr(), every.data_ptr(), operand.data_ptr())
        folder(expected, [every, operand], final=False)
        assert torch.equal(bits(out), bits(expected)), f"with {other}"


# ---------------------------------------------------------------------- collectives


def draws(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    return operand(dtype, count, 1000 + rank).nan_to_num() if dtype.is_floating_point else operand(dtype, count, rank)


@pytest.mark.parametrize("memory", ["tensor", "window"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_both_engines_give_the_same_bits_and_move_the_same_bytes(size: int, memory: str) -> None:
    """Every algorithm, short and long, in segments that go into slots whole, in parts, and by puts."""

    def body(comm: Communicator) -> tuple[list[Tensor], list[tuple[int, ...]]]:
        results, moved = [], []
        for dtype, count in itertools.product((torch.float32, torch.bfloat16, torch.int64), (1, 1000, 70_001)):
            for name, entry in sorted(algorithms("all_reduce").items()):
                if entry.native or (name == "halving_doubling" and size == 5):
                    continue
                tensor = comm.empty(count, dtype) if memory == "window" else torch.empty(count, dtype=dtype)
                tensor.copy_(draws(comm.rank, count, dtype))
                before = comm.counters.messages_sent, comm.counters.bytes_sent, comm.counters.bytes_received
                comm.all_reduce(tensor, algorithm=name)
                after = comm.counters.messages_sent, comm.counters.bytes_sent, comm.counters.bytes_received
                results.append(tensor.clone())
                moved.append(tuple(b - a for a, b in zip(before, after, strict=True)))
        return results, moved

    mine = run_ranks(body, size, "shm", segment_bytes=40_000)
    reference = run_ranks(body, size, "shm:python", segment_bytes=40_000)
    for (results, moved), (expected, expected_moved) in zip(mine, reference, strict=True):
        assert moved == expected_moved
        for at, (result, right) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(bits(result), bits(right)), f"case {at}"


def test_the_player_is_what_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the comparison above compares nothing."""

    def body(comm: Communicator) -> int:
        player = comm.transport.player
        if player is None:
            return -1
        played: list[int] = []
        whole = player.play
        monkeypatch.setattr(player, "play", lambda *args: (played.append(1), whole(*args))[1])
        tensor = torch.ones(10)
        for _ in range(3):
            comm.all_reduce(tensor)
        comm.barrier()
        return len(played)

    least = min(run_ranks(body, 2, "shm"))
    assert least >= 2, "the first all-reduce and the barrier; the others are recalled, and perhaps waited for there"
    assert run_ranks(body, 2, "shm:python") == [-1, -1]


def test_there_is_one_copy_of_what_goes_to_several_peers() -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        transport = comm.transport
        assert isinstance(transport, ShmTransport)
        comm.all_reduce(torch.ones(5000), algorithm="one_shot")
        words = transport.window.words
        entries = [
            link.entries_out + 4 * (link.state[links.SENT] % links.ENTRIES) for link in transport._links.values()
        ]
        places = {words[entry + links.PLACE] for entry in entries if words[entry + links.LENGTH] == 20_000}
        return len(entries), len(places)

    assert run_ranks(body, 4, "shm") == [(3, 1)] * 4
    assert run_ranks(body, 4, "shm:python") == [(3, 3)] * 4


@pytest.mark.parametrize("late", range(3))
def test_a_copy_that_is_shared_stays_until_the_last_has_read_it(late: int) -> None:
    """Eight times as much as there are slots, and a rank that comes when all are full."""

    def body(comm: Communicator) -> bool:
        right = True
        for turn in range(4):
            if comm.rank == late:
                time.sleep(0.03)  # the others fill all slots in some ms
            found, expected = torch.empty(3 << 20), torch.arange(3 << 20) + turn
            comm.all_gather(found, expected.float()[comm.rank << 20 : comm.rank + 1 << 20], algorithm="direct")
            right &= torch.equal(found, expected.float())
        return right

    assert run_ranks(body, 3, "shm") == [True] * 3


def test_a_trace_has_the_same_spans(tmp_path: Path) -> None:
    def body(comm: Communicator) -> list[tuple[str, str]]:
        comm.start_trace(str(tmp_path / "trace.json"))
        tensor = torch.ones(5000)
        comm.all_reduce(tensor, algorithm="ring")
        comm.all_reduce(tensor, algorithm="ring")
        comm.broadcast(tensor)
        tracer = comm._runner.tracer
        assert tracer is not None
        assert all(event["dur"] >= 0 for event in tracer.events)
        return [(event["cat"], event["name"]) for event in tracer.events]

    assert run_ranks(body, 3, "shm", segment_bytes=4096) == run_ranks(body, 3, "shm:python", segment_bytes=4096)


def test_what_the_player_cannot_fold_is_run_by_python() -> None:
    def body(comm: Communicator) -> list[complex]:
        tensor = torch.tensor([1 + 2j, 3 - 1j]) * (comm.rank + 1)
        comm.all_reduce(tensor, "prod")
        comm.all_reduce(tensor, "prod")
        return tensor.tolist()

    assert run_ranks(body, 2, "shm") == run_ranks(body, 2, "shm:python")


# ---------------------------------------------------------------------- waiting


def test_a_call_that_was_made_before_may_time_out_and_says_so() -> None:
    """The short way into the player ends in the long one as soon as something is wrong."""

    def body(comm: Communicator) -> None:
        tensor = torch.ones(4)
        for _ in range(3):
            comm.all_reduce(tensor)
        if comm.rank == 0:
            comm.all_reduce(tensor)
        else:
            time.sleep(1.0)

    began = time.monotonic()
    failures = run_ranks(body, 2, "shm", timeout=0.3, return_exceptions=True)
    assert isinstance(failures[0], CollectiveTimeout)
    assert "all_reduce #4 (sum, float32, 4 elements" in str(failures[0])
    assert "test_player.py" in str(failures[0])
    assert time.monotonic() - began < 5


def test_other_threads_run_while_the_player_waits() -> None:
    def body(comm: Communicator) -> int:
        tensor = torch.ones(4)
        comm.all_reduce(tensor)
        counted = 0
        ending = threading.Event()

        def count() -> None:
            nonlocal counted
            while not ending.is_set():
                counted += 1
                time.sleep(0.001)

        if comm.rank == 1:
            time.sleep(0.3)
            comm.all_reduce(tensor)
            return 100
        helper = threading.Thread(target=count)
        helper.start()
        comm.all_reduce(tensor)
        ending.set()
        helper.join()
        return counted

    assert min(run_ranks(body, 2, "shm")) > 20


_WAITS = """
import os, signal, threading, time, torch

def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored by what started this
    # The main thread is a rank of its own communicator of two; the other rank does not come.
    from ringred.testing.ranks import connect
    from ringred.communicator import Communicator
    make = connect("shm", 2)
    ends = {}
    other = threading.Thread(target=lambda: ends.update({1: Communicator(make(1))}), daemon=True)
    other.start()
    comm = Communicator(make(0))
    other.join()
    def interrupt():
        while comm.runner.doings.current is None:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    try:
        comm.all_reduce(torch.ones(4))
    except KeyboardInterrupt:
        print("interrupted", time.monotonic() - began < 5)
    try:
        ends[1].all_reduce(torch.ones(4))
    except Exception as failure:
        print(type(failure).__name__, failure)

main()
"""


def test_ctrl_c_ends_a_wait_and_the_others_are_told() -> None:
    ended = subprocess.run([sys.executable, "-c", _WAITS], capture_output=True, text=True, timeout=60, check=True)
    first, second = ended.stdout.splitlines()[:2]
    assert first == "interrupted True"
    assert second.startswith("PeerFailed rank 1: all_reduce")
    assert "rank 0 raised KeyboardInterrupt" in second


def test_a_forked_child_has_no_part_in_it() -> None:
    def body(comm: Communicator) -> str:
        tensor = torch.ones(4)
        comm.all_reduce(tensor)
        said = ""
        if comm.rank == 0:
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                try:
                    comm.all_reduce(tensor)
                    text = "it took part"
                except BaseException as failure:
                    text = str(failure)
                os.write(writer, text.encode()[:4000])
                os._exit(0)
            os.close(writer)
            said = os.read(reader, 4000).decode()
            os.close(reader)
            os.waitpid(child, 0)
        comm.all_reduce(tensor)
        return f"{said} {tensor[0].item():g}"

    first, second = run_ranks(body, 2, "shm")
    assert "a forked child has no part" in first
    assert first.endswith(" 4")
    assert second == " 4"
