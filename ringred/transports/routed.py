"""The nearest way to each peer: shared memory to those on this host, MPI or torch's point-to-point to the others.

Both transports carry the same contracts. An abort is passed to both, and while a rank waits on one of them the other
must make progress: MPI moves messages only when it is called, and queued sends of shared memory leave only when
somebody checks for room.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ringred.errors import TransportUnavailable
from ringred.transports import neighbours, shm_player
from ringred.transports.base import Gather, Request, Transport
from ringred.transports.cuda.staged import StagedTransport
from ringred.transports.links import PART_BYTES
from ringred.transports.shm import ShmTransport

__all__ = ["RoutedTransport", "alone", "join"]

_DRAIN_SECONDS = 0.0005


def join(
    gather: Gather,
    rank: int,
    size: int,
    far: Callable[[], Transport],
    timeout: float,
    *,
    only_near: bool = False,
    keep_far: bool = False,
    compiled: bool = True,
) -> Transport:
    """The transport of `rank` among `size`: shared memory where it reaches, `far()` elsewhere. Collective.

    `keep_far` calls `far()` even if shared memory reaches all ranks, for its other abilities; `only_near` requires that
    shared memory reaches all ranks; with `compiled` plans are played by the compiled player, where there is one. Raises
    `TransportUnavailable`.
    """
    found, reason = neighbours.connect(gather, rank, compiled and shm_player.unusable() is None)
    reach = 1 if found is None else len(found.members)
    if only_near and reach < size:
        if found is not None:
            found.close()
        why = reason or f"only {reach} of {size} ranks are on the host of rank {rank}"
        raise TransportUnavailable(f"rank {rank}: shared memory does not reach all ranks: {why}")
    somebody = any(text == "near" for text in gather("far" if found is None else "near"))
    if found is None:
        if reason is not None:
            warnings.warn(f"ringred: rank {rank} goes without shared memory: {reason}", stacklevel=2)
        return alone(far()) if somebody else far()
    names = found.members if reach < size else None
    try:
        near = ShmTransport(found, found.members, "world", timeout, names, size)
    except BaseException:
        found.close()
        raise
    if reach == size and not keep_far:
        return near
    try:
        return RoutedTransport(near, far())
    except BaseException:
        near.close()
        raise


def alone(far: Transport, near: str = "shm", part_bytes: int = PART_BYTES) -> Transport:
    """`far` of a rank without neighbours, where others have some by `near`: it must cut and choose as they do."""
    far.segment_bytes, far.model = part_bytes, f"{near}+{far.name}"
    return far


class RoutedTransport:
    """`near` to the peers that it reaches, `far` to the others."""

    windows = True

    def __init__(self, near: ShmTransport, far: Transport) -> None:
        self.near, self.far = near, far
        self.queue = near.queue
        if isinstance(far, StagedTransport) and near.queue is not None:
            far.beside(near.queue, near.passed)
        self.rank, self.size = near.rank, near.size
        self.segment_bytes = near.segment_bytes
        self.depth = near.depth if len(near.peers) == near.size - 1 else far.depth
        self.empty, self.expose, self.holds = near.empty, near.expose, near.holds
        far.counters = near.counters
        self._near_peers = frozenset(near.peers)
        self._all_near = self.buffers = len(self._near_peers) == self.size - 1
        self.player = near.player if self._all_near else None
        self.name = self.model = near.name if self._all_near else f"{near.name}+{far.name}"
        if self._all_near:
            # All peers are near: calls go to `near` directly.
            self.begin, self.isend, self.irecv = near.begin, near.isend, near.irecv  # type: ignore[method-assign]
            self.wait, self.release = near.wait, near.release  # type: ignore[method-assign]
        else:
            near.meanwhile = getattr(far, "progress", None)
        if hasattr(far, "can_all_reduce"):
            self.can_all_reduce = far.can_all_reduce
            self.native_all_reduce = self._native_all_reduce

    @property
    def counters(self) -> Any:
        return self.near.counters

    @counters.setter
    def counters(self, value: Any) -> None:
        self.near.counters = self.far.counters = value

    @property
    def timeout(self) -> float | None:
        """Seconds that `far` may wait by itself, where it does (`cuda/staged.py`)."""
        return getattr(self.far, "timeout", None)

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        if isinstance(self.far, StagedTransport):
            self.far.timeout = seconds

    def begin(self, contract: int, turn: int) -> None:
        self.near.begin(contract, turn)
        self.far.begin(contract, turn)

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> Request:
        way: Transport = self.near if peer in self._near_peers else self.far
        return way, way.isend(peer, src, put, buffered)

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> Request:
        way: Transport = self.near if peer in self._near_peers else self.far
        return way, way.irecv(peer, dst, lend)

    def wait(self, request: Request, deadline: float) -> Tensor | None:
        way: Transport = request[0]
        inner = request[1]
        if way is self.far and self.near.queued:
            with self._draining():
                return way.wait(inner, deadline)
        return way.wait(inner, deadline)

    @contextlib.contextmanager
    def _draining(self) -> Iterator[None]:
        """While this thread waits on `far`, another thread posts the sends of `near` that are queued for room."""
        ending = threading.Event()

        def drain() -> None:
            with contextlib.suppress(RuntimeError):  # of a device; whoever waits for it hears of that
                while self.near.queued and not ending.wait(_DRAIN_SECONDS):
                    self.near.drain()

        helper = threading.Thread(target=drain, name=f"ringred-drain-{self.rank}", daemon=True)
        helper.start()
        try:
            yield
        finally:
            ending.set()
            helper.join()

    def release(self, request: Request) -> None:
        way, inner = request
        way.release(inner)

    def _native_all_reduce(self, tensor: Tensor, op: str, deadline: float) -> None:
        if self._all_near:
            self.far.begin(*self.near.begun)
        native: Any = self.far
        native.native_all_reduce(tensor, op, deadline)

    def passed(self, point: Any, deadline: float, hurry: threading.Event | None = None) -> None:
        self.near.passed(point, deadline, hurry)

    def settle(self, deadline: float) -> None:
        self.near.settle(deadline)
        if not self._all_near:
            self.far.settle(deadline)

    def abort(self, report: str) -> None:
        self.near.abort(report)
        self.far.abort(report)

    def reports(self, timeout: float) -> dict[int, str]:
        return (self.near if self._all_near else self.far).reports(timeout)

    def subset(self, members: Sequence[int], key: str) -> Transport:
        far = self.far.subset(members, key)
        near_ranks = [rank for rank in members if rank in self._near_peers or rank == self.rank]
        if len(near_ranks) == 1:
            part_bytes = PART_BYTES if self.queue is None else self.near.segment_bytes
            return alone(far, self.near.name, part_bytes)
        names = None if len(near_ranks) == len(members) else [list(members).index(rank) for rank in near_ranks]
        try:
            return RoutedTransport(self.near.family(near_ranks, key, names, len(members)), far)
        except BaseException:
            far.close()
            raise

    def close(self) -> None:
        try:
            self.near.close()
        finally:
            self.far.close()
