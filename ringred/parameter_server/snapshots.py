"""Snapshots on disk: a folder for each, with a file of every shard, and one of the coordinator that makes it whole.

    FOLDER/update-000000000500-4f0c…/shard-0.pt, shard-1.pt, whole.json

Each file is written beside its place and renamed, `whole.json` last: a snapshot without it is not one. Nothing in the
files is pickled code: `torch.load(weights_only=True)` reads them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from ringred.errors import PolicyError
from ringred.parameter_server.shard import Writing
from ringred.parameter_server.whole import joined

__all__ = ["Writer", "newest", "read_snapshot"]

_WHOLE = "whole.json"
_WAITING = 4  # snapshots that may wait to be written: each is a copy of a shard
_KEPT = 2  # snapshots, of those that are made after so many updates


class Writer:
    """A thread that writes what it is given, and tells of it by `told(writing, failure)`."""

    def __init__(self, told: Callable[[Writing, str], None]) -> None:
        self._told = told
        self._given: SimpleQueue[tuple[Writing, bool] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def write(self, writing: Writing, *, prune: bool) -> None:
        """Begins to write; with `prune`, old snapshots of the folder are then removed. What comes faster than it can be
        written fails."""
        if self._given.qsize() >= _WAITING:
            self._told(writing, f"{_WAITING} snapshots before it are not written yet")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ringred-snapshots", daemon=True)
            self._thread.start()
        self._given.put((writing, prune))

    def close(self) -> None:
        """Waits for what was given."""
        if self._thread is not None:
            self._given.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (given := self._given.get()) is not None:
            failure = ""
            try:
                _write(given[0])
                if given[1]:
                    _prune(Path(given[0].folder), given[0].snapshot)
            except Exception as error:  # a full disk does not end a training
                failure = f"{type(error).__name__}: {error}"
            self._told(given[0], failure)


def _write(writing: Writing) -> None:
    folder = Path(writing.folder) / writing.snapshot
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / (_WHOLE if writing.number < 0 else f"shard-{writing.number}.pt")
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            if writing.number < 0:
                file.write(writing.text.encode())
            else:
                torch.save({"told": writing.text, "tensors": list(writing.tensors)}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(place)
    finally:
        unfinished.unlink(missing_ok=True)
    for changed in (folder, folder.parent):
        opened = os.open(changed, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _prune(folder: Path, snapshot: str) -> None:
    """Removes what is older than `snapshot`, whole or not, but for the newest whole ones."""
    older = sorted((path for path in folder.glob("update-*") if path.name < snapshot), key=lambda path: path.name)
    whole = [path for path in older if (path / _WHOLE).exists()]
    for path in older:
        if path not in whole[-(_KEPT - 1) :]:
            with contextlib.suppress(OSError):
                (path / _WHOLE).unlink(missing_ok=True)  # from here on it is none, whatever else is left of it
                shutil.rmtree(path)


def newest(folder: str | Path) -> Path | None:
    """The whole snapshot with the most updates; of several, the one written last."""
    found = [path for path in Path(folder).glob(f"update-*/{_WHOLE}") if path.parent.name[:1] != "."]
    updates = [(path.parent.name.split("-")[1], path.stat().st_mtime_ns, path.parent) for path in found]
    return max(updates)[2] if updates else None


def read_snapshot(folder: str | Path) -> dict[str, Any]:
    """All that the newest snapshot in `folder`, or the snapshot `folder`, has: see `whole`. Raises `PolicyError` if
    there is none, or a file of it is missing or damaged."""
    place = Path(folder) if (Path(folder) / _WHOLE).exists() else newest(folder)
    if place is None:
        raise PolicyError(f"there is no snapshot in {folder}")
    try:
        told = json.loads((place / _WHOLE).read_text())
        shards = []
        for number in range(told["shards"]):
            kept = torch.load(place / f"shard-{number}.pt", weights_only=True, mmap=True)
            shards.append((json.loads(kept["told"]), kept["tensors"]))
        return joined(told, shards)
    except (OSError, KeyError, ValueError, RuntimeError) as failure:
        raise PolicyError(f"{place} is damaged: {type(failure).__name__}: {failure}") from None
