"""Stores, where ranks that are not connected yet leave texts for each other: torch's, and boards (`board_store.py`)."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as _distributed

from ringred.errors import TransportUnavailable
from ringred.transports.base import Gather
from ringred.transports.membership.view import View
from ringred.transports.membership.wire import Malformed

dist: Any = _distributed  # torch declares no types for most of what is used here

__all__ = ["Part", "corner", "gatherer", "group_store", "leave", "rendezvous", "told"]

_TELLING_SECONDS = 5.0


def rendezvous(timeout: float, restart: str) -> Any:
    """The store that torchrun, or rank 0 at MASTER_ADDR:MASTER_PORT, serves. Raises `TransportUnavailable`."""
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    except (RuntimeError, ValueError) as failure:
        raise TransportUnavailable(
            f"no store at MASTER_ADDR:MASTER_PORT: {failure}; start every rank with torchrun"
        ) from failure
    # After an elastic restart the store may be the old one, with the old keys in it.
    return dist.PrefixStore(f"ringred/{restart}", store)


def group_store(group: Any) -> tuple[Any, int, int]:
    """(store, rank, size) of a torch process group, for ranks that have called `init_process_group`."""
    from torch.distributed import distributed_c10d as c10d

    group = dist.group.WORLD if group is None else group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"rank {dist.get_rank()} is no member of the process group given")
    return dist.PrefixStore("ringred", c10d._get_process_group_store(group)), rank, size


class Part(dist.PrefixStore):  # type: ignore[misc]
    """The part `name` of `store`, which it keeps: torch itself would let go of a store that is written in Python."""

    def __init__(self, name: str, store: Any) -> None:
        super().__init__(name, store)
        self._name, self._store = name, store

    def clone(self) -> Any:
        return Part(self._name, self._store.clone() if hasattr(self._store, "clone") else self._store)


def corner(store: Any, rank: int) -> Any:
    """A fresh part of `store`: the n-th call on each rank gets part n, so that one store serves many communicators."""
    try:
        turn = store.add(f"turn/{rank}", 1)
    except RuntimeError as failure:
        raise TransportUnavailable(f"rank {rank}: no store to meet at: {failure}") from failure
    return Part(f"turn-{turn}", store)


def gatherer(store: Any, rank: int, size: int, timeout: float) -> Gather:
    """Returns a `Gather` through `store`, which raises `TransportUnavailable` if a rank does not come in time."""
    rounds = itertools.count()

    def gather(text: str) -> list[str]:
        label = next(rounds)
        try:
            store.set(f"text-{label}/{rank}", text)
            keys = [f"text-{label}/{peer}" for peer in range(size)]
            store.wait(keys, timedelta(seconds=timeout))
            return [store.get(key).decode() for key in keys]
        except RuntimeError as failure:
            raise TransportUnavailable(
                f"rank {rank}: not all of {size} ranks came to the store within {timeout:g} s: {failure}"
            ) from failure

    return gather


def leave(store: Any, rank: int, size: int, timeout: float) -> None:
    """Says that `rank` needs the store no more; rank 0, whose process may serve it, waits until all have said so."""
    try:
        store.set(f"left/{rank}", "")
        if rank == 0:
            store.wait([f"left/{peer}" for peer in range(size)], timedelta(seconds=timeout))
    except RuntimeError as failure:
        raise TransportUnavailable(
            f"rank {rank}: not all of {size} ranks joined within {timeout:g} s: {failure}"
        ) from failure


def told(store: Any) -> Callable[[View], View]:
    """As `Rendezvous.tell`, by a store that no rank serves: a view counts if it is the first of its generation."""

    def tell(view: View) -> View:
        answer: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        name, text = f"view {view.generation} of {view.lineage} {view.origin}", json.dumps(view.as_fields())

        def ask() -> None:
            try:
                answer.set_result(store.compare_set(name, "", text))
            except Exception as failure:  # of whatever store it is
                answer.set_exception(RuntimeError(failure))

        # Where the host that serves it is cut off, torch waits for as long as a rendezvous may take.
        threading.Thread(target=ask, name="ringred-telling", daemon=True).start()
        try:
            return View.from_fields(json.loads(answer.result(_TELLING_SECONDS)))
        except (RuntimeError, ValueError, Malformed, concurrent.futures.TimeoutError):
            return view  # nobody is there to ask

    return tell
