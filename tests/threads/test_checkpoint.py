"""Checkpoints: whole or not at all, checked, and of any number of ranks."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ringred
from ringred.communicator import Communicator
from ringred.data_parallel import checkpoint as module
from ringred.data_parallel.trees import planted, uprooted
from ringred.testing import run_ranks


class Holder:
    def __init__(self, comm: Communicator) -> None:
        self.comm = comm


def state(seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": {"a": torch.randn(33, 7, generator=generator), "b": torch.ones(5, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "empty": torch.empty(0, 4)}}, "betas": (0.9, 0.999)},
        "flags": [True, None, "text ü", -3, math.inf],
        "complex": torch.randn(3, generator=generator) * 1j,
        "bits": torch.tensor([True, False]),
        "numbers": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "view": torch.arange(20.0).view(4, 5).t(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def save(folder: Path, ranks: int, *steps: int, keep: int = 2) -> None:
    def body(comm: Communicator) -> None:
        checkpoints = ringred.checkpoint.Checkpoints(folder, Holder(comm), keep)
        for step in steps:
            checkpoints.save(step, state(step))
        checkpoints.wait()

    run_ranks(body, ranks, "shm" if ranks > 1 else "local")


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_what_is_read_is_what_was_written(ranks: int, tmp_path: Path) -> None:
    save(tmp_path, ranks, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-7"]
    assert len(list((tmp_path / "step-7").glob("part-*"))) == ranks
    found = ringred.checkpoint.load(tmp_path)
    assert found is not None
    assert found.step == 7
    assert same(found.state, state(7))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 2, 1, 2, 10, 11, keep=2)
    assert ringred.checkpoint.steps_in(tmp_path) == [11, 10]
    found = ringred.checkpoint.load(tmp_path, 10)
    assert found is not None
    assert same(found.state, state(10))
    assert ringred.checkpoint.load(tmp_path / "nothing") is None


@pytest.mark.parametrize("how", ["bit", "short", "long", "gone", "index", "no index"])
def test_a_damaged_one_is_never_taken(how: str, tmp_path: Path) -> None:
    save(tmp_path, 3, 1, 2)
    part, index = tmp_path / "step-2" / "part-1-of-3", tmp_path / "step-2" / "index.json"
    if how == "bit":
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 4
        part.write_bytes(bytes(data))
    elif how == "short":
        part.write_bytes(part.read_bytes()[:-1])
    elif how == "long":
        part.write_bytes(part.read_bytes() + b"x")
    elif how == "gone":
        part.unlink()
    elif how == "index":
        index.write_text(index.read_text().replace('"step": 2', '"step": 3'))
    else:
        index.unlink()
    with pytest.raises(ringred.checkpoint.Damaged, match="step-2"):
        ringred.checkpoint.load(tmp_path, 2)
    with pytest.warns(UserWarning, match="an older one is taken"):
        found = ringred.checkpoint.load(tmp_path)
    assert found is not None
    assert found.step == 1
    assert same(found.state, state(1))


def test_a_half_written_one_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank dies before its share is written: the others say so in time, and nothing is left of it."""
    save(tmp_path, 2, 1)
    monkeypatch.setattr(module, "_PATIENCE", 0.3)

    def body(comm: Communicator) -> str:
        checkpoints = ringred.checkpoint.Checkpoints(tmp_path, Holder(comm))
        if comm.rank == 1:
            monkeypatch.setattr(module._Job, "run", lambda job: None if job.comm.rank else original(job))
        comm.barrier()
        checkpoints.save(2, state(2))
        if comm.rank == 0:
            with pytest.raises(ringred.checkpoint.Damaged, match="not all ranks wrote their shares"):
                checkpoints.wait()
        return "done"

    original = module._Job.run
    assert run_ranks(body, 2, "shm") == ["done", "done"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]
    found = ringred.checkpoint.load(tmp_path)
    assert found is not None
    assert found.step == 1


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the state of the call, whatever happens to its tensors before it is on disk."""
    may_write = threading.Event()
    original = module._write_file
    monkeypatch.setattr(module, "_write_file", lambda *args: (may_write.wait(10), original(*args)))

    def body(comm: Communicator) -> None:
        checkpoints = ringred.checkpoint.Checkpoints(tmp_path, Holder(comm))
        tensors = state(5)
        checkpoints.save(5, tensors)
        for tensor in tensors["weights"].values():
            tensor.zero_()
        comm.barrier()
        assert ringred.checkpoint.steps_in(tmp_path) == []
        may_write.set()
        checkpoints.wait()
        assert ringred.checkpoint.steps_in(tmp_path) == [5]

    run_ranks(body, 2, "shm")
    found = ringred.checkpoint.load(tmp_path)
    assert found is not None
    assert same(found.state, state(5))


@pytest.mark.parametrize("odd", [{1, 2}, object(), torch.eye(3).to_sparse()])
def test_what_is_no_plain_state_is_refused(odd: Any) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]: expected"):
        uprooted({"a": [1, odd]})


def test_a_tree_and_back() -> None:
    text, tensors = uprooted(state())
    assert same(planted(text, tensors), state())


def test_one_that_not_all_complete_is_given_up_when_the_ranks_change(tmp_path: Path) -> None:
    def body(comm: Communicator) -> int:
        holder = Holder(comm)
        checkpoints = ringred.checkpoint.Checkpoints(tmp_path, holder)
        comm.barrier()
        if comm.rank == 2:
            time.sleep(0.3)  # the others are past the barrier
            raise ZeroDivisionError("no batch left")
        checkpoints.save(4, state(4))  # the third share is missing
        holder.comm = comm.shrink()
        checkpoints.save(5, state(5))
        checkpoints.wait()
        return holder.comm.size

    with pytest.warns(UserWarning, match="checkpoint of step 4 given up: the ranks have changed"):
        results = run_ranks(body, 3, "shm", return_exceptions=True)
    assert results[:2] == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-5"]


def test_saves_go_on_behind_a_damaged_one_that_is_newer(tmp_path: Path) -> None:
    save(tmp_path, 2, 1, 9)
    (tmp_path / "step-9" / "part-0-of-2").write_bytes(b"")
    save(tmp_path, 2, 5, 6)
    with pytest.warns(UserWarning, match="an older one is taken"):
        found = ringred.checkpoint.load(tmp_path)
    assert found is not None
    assert found.step == 6
    assert ringred.checkpoint.steps_in(tmp_path) == [9, 6, 5]


def test_after_a_failure_that_nobody_goes_on_from_no_rank_waits_for_shares(tmp_path: Path) -> None:
    def body(comm: Communicator) -> float:
        checkpoints = ringred.checkpoint.Checkpoints(tmp_path, Holder(comm))
        comm.barrier()
        if comm.rank == 2:
            time.sleep(0.3)
            raise ZeroDivisionError("no batch left")
        checkpoints.save(4, state(4))
        with pytest.raises(ringred.RingredError):
            comm.barrier()
        began = time.monotonic()
        checkpoints.wait()
        return time.monotonic() - began

    with pytest.warns(UserWarning, match="given up: ranks have failed"):
        results = run_ranks(body, 3, "shm", return_exceptions=True)
    assert all(isinstance(took, float) and took < 5 for took in results[:2]), results
