"""Checkpoints: written by all ranks while training goes on, whole or not at all, checked when they are read.

    checkpoints = ringred.checkpoint.Checkpoints("run-7", model)
    if (found := checkpoints.newest()) is not None:
        state.load_state_dict(found.state)            # of any number of ranks
    ...
    checkpoints.save(step, state.state_dict())        # returns once this rank's share is copied

A checkpoint is a folder, `step-N`. Its tensors, one after the other, are cut into as many files as there were ranks,
and `index.json` has the rest of the state, the sizes and the checksums (BLAKE2b) of all files and its own. It is made
under another name and renamed when all is on disk. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ringred.communicator import Communicator
from ringred.data_parallel.trees import planted, shapes_of, uprooted
from ringred.errors import RingredError
from ringred.runtime.tensors import carried

__all__ = ["Checkpoints", "Damaged", "Found", "load", "steps_in"]

_FORMAT = 1
_INDEX = "index.json"
_PATIENCE = 600.0  # seconds for the other ranks to write their shares
_LOOK_SECONDS = 0.02
_CHUNK = 8 << 20


class Damaged(RingredError, OSError):
    """A checkpoint is not what was written."""


class _GivenUp(Exception):
    """A checkpoint that not all ranks will complete."""


class Found(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: Any


class _Model(Protocol):
    @property
    def comm(self) -> Communicator:
        """Its ranks of now."""


class Checkpoints:
    """The checkpoints in `folder`, which all ranks of `model` (anything with a `comm`) see. The newest `keep` are kept.
    All ranks save the same steps; they meet in the folder, so that a rank that fails meanwhile fails no other. A
    checkpoint that not all will complete is given up."""

    def __init__(self, folder: str | Path, model: _Model, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"Checkpoints: expected to keep ≥ 1, got {keep}")
        self.folder, self._model, self._keep = Path(folder), model, keep
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, state: Any, *, wait: bool = False) -> None:
        """Writes `state`, which is the same on all ranks: dictionaries, lists and numbers with dense tensors in them.

        Returns once this rank's share of it is copied, after the checkpoint before is done; with `wait` once the whole
        is on disk. Raises what went wrong with the one before."""
        self.wait()
        comm = self._model.comm
        text, tensors = uprooted(state)
        total = sum(tensor.nbytes for tensor in tensors)
        begin, end = total * comm.rank // comm.size, total * (comm.rank + 1) // comm.size
        share = b"".join(_range(tensors, begin, end))
        self.folder.mkdir(parents=True, exist_ok=True)
        before = frozenset(os.listdir(self.folder))
        unfinished = self.folder / f".step-{step}-{_token(comm, step)}"
        unfinished.mkdir(exist_ok=True)
        job = _Job(self.folder / f"step-{step}", unfinished, comm, share, step, text, self._keep, before)
        self._writer = threading.Thread(target=self._write, args=(job,), name="ringred-checkpoint")
        self._writer.start()
        if wait:
            self.wait()

    def _write(self, job: _Job) -> None:
        try:
            job.run()
        except BaseException as failure:
            self._failure = failure

    def wait(self) -> None:
        """Returns once the last checkpoint is on disk, whole; raises what went wrong with it."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def newest(self) -> Found | None:
        """The newest checkpoint that is whole; None if there is none. Others that are newer are told of."""
        return load(self.folder)


class _Job(NamedTuple):
    """One rank's part in writing one checkpoint."""

    final: Path
    unfinished: Path
    comm: Communicator
    share: bytes
    step: int
    text: str
    keep: int
    before: frozenset[str]
    """What was in the folder when it was begun."""

    def run(self) -> None:
        """Does it, or gives it up: rank 0 alone decides, tells, and removes what is not complete."""
        try:
            self._run()
        except FileNotFoundError:
            if self.comm.rank == 0:
                raise
        except _GivenUp as reason:
            if self.comm.rank == 0:
                shutil.rmtree(self.unfinished, ignore_errors=True)
                warnings.warn(f"ringred: checkpoint of step {self.step} given up: {reason}", stacklevel=2)

    def _run(self) -> None:
        part = _part(self.comm.rank, self.comm.size)
        _write_file(self.unfinished / part, self.share)
        card = json.dumps({"name": part, "bytes": len(self.share), "blake2b": _digest(self.share)})
        _write_file(self.unfinished / f"{part}.json", card.encode())
        if self.comm.rank == 0:
            self._complete()
        else:
            self._until(lambda: not self.unfinished.exists(), "rank 0 did not complete it")

    def _complete(self) -> None:
        cards = [self.unfinished / f"{_part(rank, self.comm.size)}.json" for rank in range(self.comm.size)]
        try:
            self._until(lambda: all(card.exists() for card in cards), "not all ranks wrote their shares")
            parts = [json.loads(card.read_text()) for card in cards]
            index = json.dumps({"format": _FORMAT, "step": self.step, "parts": parts, "tree": self.text})
            _write_file(self.unfinished / _INDEX, f"{index}\n{_digest(index.encode())}\n".encode())
            for card in cards:
                card.unlink()
            earlier = self.unfinished.with_name(f"{self.unfinished.name}-earlier")
            if self.final.exists():  # of this step, from before a restart
                self.final.rename(earlier)
            self.unfinished.rename(self.final)
            _sync(self.final.parent)
            shutil.rmtree(earlier, ignore_errors=True)
        except BaseException:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            raise
        folder = self.final.parent
        for step in [step for step in steps_in(folder) if step <= self.step][self.keep :]:
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
        for path in folder.glob(".step-*"):  # what a crash has left; a later one of this job is not begun
            if _step_of(path) <= self.step:
                shutil.rmtree(path, ignore_errors=True)

    def _until(self, done: Any, otherwise: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not done():
            if self.comm.successor is not None:
                raise _GivenUp("the ranks have changed")
            if self.comm.runner.failed:
                raise _GivenUp("ranks have failed")
            new = set(os.listdir(self.final.parent)) - self.before
            if any(_step_of(self.final.with_name(name)) > self.step for name in new):
                raise _GivenUp("other ranks are at a later one")
            if time.monotonic() > deadline and self.comm.rank:
                raise _GivenUp(otherwise)
            if time.monotonic() > deadline:
                raise Damaged(f"checkpoint of step {self.step}: {otherwise} in {_PATIENCE:g} s")
            time.sleep(_LOOK_SECONDS)


def _token(comm: Communicator, step: int) -> str:
    """What all ranks know that take part, and no other attempt has: a crash may have left some of another."""
    known = secrets.token_hex(8) if comm.seat is None else f"{comm.seat.view.key} {step}"
    return hashlib.blake2b(known.encode(), digest_size=8).hexdigest()


def _step_of(path: Path) -> int:
    """The step of a checkpoint, finished or not; -1 for other files."""
    parts = path.name.lstrip(".").split("-")
    return int(parts[1]) if parts[0] == "step" and len(parts) > 1 and parts[1].isdigit() else -1


def steps_in(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in a folder, newest first."""
    names = [path.name.removeprefix("step-") for path in Path(folder).glob("step-*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def load(folder: str | Path, step: int | None = None) -> Found | None:
    """The checkpoint of `step`; by default the newest that is whole, or None if there is none.

    Raises `Damaged` if that of `step` is not what was written; of others that are newer it warns."""
    for number in steps_in(folder) if step is None else [step]:
        try:
            return Found(number, _read(Path(folder) / f"step-{number}"))
        except Damaged as damage:
            if step is not None:
                raise
            warnings.warn(f"ringred: {damage}: an older one is taken", stacklevel=2)
    return None


def _read(path: Path) -> Any:
    try:
        text, _, digest = (path / _INDEX).read_text().rstrip("\n").rpartition("\n")
        if digest != _digest(text.encode()):
            raise Damaged(f"{path / _INDEX} is not what was written")
        index = json.loads(text)
        if index["format"] != _FORMAT:
            raise Damaged(f"{path}: expected format {_FORMAT}, got {index['format']}")
        tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in shapes_of(index["tree"])]
        memory = _Memory(tensors)
        for part in index["parts"]:
            _read_part(path / part["name"], part["bytes"], part["blake2b"], memory)
        return planted(index["tree"], tensors)
    except (OSError, ValueError, KeyError) as failure:
        if isinstance(failure, Damaged):
            raise
        raise Damaged(f"{path}: {failure!r}") from None


def _read_part(path: Path, nbytes: int, expected: str, memory: _Memory) -> None:
    digest, left = hashlib.blake2b(digest_size=32), nbytes
    with path.open("rb") as file:
        while left and (data := file.read(min(_CHUNK, left))):
            digest.update(data)
            memory.take(data)
            left -= len(data)
        if left or file.read(1):
            raise Damaged(f"{path}: expected {nbytes} bytes, got {path.stat().st_size}")
    if digest.hexdigest() != expected:
        raise Damaged(f"{path} is not what was written: its checksum differs")


class _Memory:
    """The memory of tensors, which are filled one after the other."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._views = [_bytes_of(tensor) for tensor in tensors if tensor.nbytes]
        self._at = self._filled = 0

    def take(self, data: bytes) -> None:
        while data:
            if self._at == len(self._views):
                raise Damaged("more bytes than its tensors have")
            view = self._views[self._at]
            count = min(len(data), len(view) - self._filled)
            view[self._filled : self._filled + count] = data[:count]
            data, self._filled = data[count:], self._filled + count
            if self._filled == len(view):
                self._at, self._filled = self._at + 1, 0


def _range(tensors: Sequence[Tensor], begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of the tensors, one after the other."""
    start = 0
    for tensor in tensors:
        low, high = max(begin - start, 0), min(end - start, tensor.nbytes)
        if low < high:
            yield bytes(_bytes_of(tensor.cpu().contiguous())[low:high])
        start += tensor.nbytes


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = carried(tensor).reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)


def _part(rank: int, size: int) -> str:
    return f"part-{rank}-of-{size}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _write_file(path: Path, data: bytes) -> None:
    """Writes a file that is on disk when it has its name."""
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
