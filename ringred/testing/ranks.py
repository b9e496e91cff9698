"""Runs many ranks as threads of one process, so that a test of a parallel program needs no launcher."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from ringred.communicator import Communicator
from ringred.errors import TransportUnavailable
from ringred.runtime.config import Config
from ringred.runtime.connect import again, meeting_board
from ringred.runtime.seat import Renewed, Seat, take
from ringred.testing.wrapped import Wrapped
from ringred.transports.base import Gather, Request, Transport
from ringred.transports.cuda.driver import Driver
from ringred.transports.local import Hub
from ringred.transports.membership.member import Member
from ringred.transports.membership.view import View
from ringred.transports.stores import gatherer

__all__ = ["Faulty", "connect", "run_ranks"]

T = TypeVar("T")


class Faulty(Wrapped):
    """A transport with random delays before sends and waits, which change the order of events like a busy network.

    Delays are at most `seconds` long and follow from `seed` and the rank.
    """

    def __init__(self, inner: Transport, seconds: float, seed: int) -> None:
        super().__init__(inner)
        self.seconds = seconds
        self._random = random.Random(f"{seed}/{inner.rank}")

    def _delay(self) -> None:
        if self._random.random() < 0.3:
            time.sleep(self._random.random() * self.seconds)

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> Request:
        self._delay()
        return self.inner.isend(peer, src, put, buffered)

    def wait(self, request: Request, deadline: float) -> Tensor | None:
        self._delay()
        return self.inner.wait(request, deadline)

    def passed(self, point: Any, deadline: float, hurry: threading.Event | None = None) -> None:
        self._delay()
        self.inner.passed(point, deadline, hurry)

    def release(self, request: Request) -> None:
        self._delay()
        self.inner.release(request)


def run_ranks(
    fn: Callable[[Communicator], T],
    size: int,
    transport: str = "local",
    *,
    timeout: float = 30.0,
    slots: int | None = None,
    segment_bytes: int | None = None,
    delay: tuple[float, int] | None = None,
    driver: Callable[[int], Driver] | None = None,
    return_exceptions: bool = False,
    sites: bool = False,
    stall_seconds: float = 10.0,
) -> list[T]:
    """Runs `fn(comm)` on `size` ranks at once and returns the results by rank.

    The ranks are threads: `transport` is "local" (memory; `slots` as in `ringred.transports.local`), "shm" (windows, as
    between processes of one host), "shm:python" (the same without the compiled player), "shm:mixed" (without it on each
    second rank), "cuda_ipc:fake" (device memory without a device; `driver` makes each rank's, by default `FakeDevice`),
    "staged:fake" (the same between hosts), or "torch_p2p" (Gloo over the loopback).
    Ranks that are processes need a launcher, mpirun or torchrun. `timeout` is that of a collective, in seconds.
    `delay=(seconds, seed)` puts random delays into sends and waits of ranks whose plans Python runs: of all, but on
    "shm:mixed". The exception of the first rank that raised one is raised, after all have ended; with
    `return_exceptions` each rank's is returned as its result. `sites` is RINGRED_CHECK=sites, `stall_seconds` is
    RINGRED_STALL_SECONDS.
    """
    config = Config(timeout=timeout, segment_bytes=segment_bytes, sites=sites, stall_seconds=stall_seconds)
    make = connect(transport, size, slots=slots, timeout=timeout, driver=driver)
    seats = _seats(transport, size, config) if size > 1 and not transport.endswith(":fake") else None
    results: list[Any] = [None] * size
    raised: list[tuple[int, BaseException]] = []

    def rank_main(rank: int) -> None:
        comm: Communicator | None = None
        try:
            end = make(rank)
            seat = None if seats is None else seats(rank, end)
            played = transport == "shm:mixed" and end.player is not None
            comm = Communicator(end if delay is None or played else Faulty(end, *delay), config=config, seat=seat)
            results[rank] = fn(comm)
            comm.newest().close()
        except BaseException as failure:
            results[rank] = failure
            raised.append((rank, failure))
            if comm is not None:
                comm.newest().abort(failure)
        finally:
            if comm is not None:
                comm.newest().close()

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised and not return_exceptions:
        raise raised[0][1]
    return results


def connect(
    transport: str,
    size: int,
    *,
    slots: int | None = None,
    timeout: float = 30.0,
    driver: Callable[[int], Driver] | None = None,
) -> Callable[[int], Transport]:
    """Returns a function that makes a rank's transport; each of `size` threads calls it. See `run_ranks`."""
    if transport == "local":
        return Hub(size, slots).transport
    if transport == "torch_p2p":
        return _torch_p2p(size, timeout)
    if transport in ("shm", "shm:python"):
        return _shm(size, timeout, transport == "shm", None)
    if transport == "shm:mixed":
        played = _shm(size, timeout, True, None)
        return lambda rank: Wrapped(played(rank)) if rank % 2 else played(rank)
    if transport == "staged:fake":
        from ringred.testing.fake_device import FakeDevice
        from ringred.transports.cuda.joining import transport as on_device

        between = Hub(size).transport
        make = driver or (lambda rank: FakeDevice())
        return lambda rank: on_device(between(rank), lambda: make(rank), "world on a device", timeout)
    if transport == "cuda_ipc:fake":
        from ringred.testing.fake_device import FakeDevice

        return _shm(size, timeout, False, driver or (lambda rank: FakeDevice()))
    kinds = "'local', 'shm', 'shm:python', 'shm:mixed', 'cuda_ipc:fake', 'staged:fake' or 'torch_p2p'"
    raise ValueError(f"run_ranks: transport is {kinds}, got {transport!r}")


def _seats(transport: str, size: int, config: Config) -> Callable[[int, Transport], Seat]:
    """Returns a function that gives a rank its seat."""
    gathers = _gathers(size, config.timeout)
    anew = replace(config, transport=transport.partition(":")[0], compiled=not transport.endswith(":python"))

    def take_seat(rank: int, end: Transport) -> Seat:
        def within(member: Member, view: View) -> Renewed:
            first = member.known(view.lineage, 0)
            ranks = [first.rank_of(card.identity) for card in view.members]
            part = end.subset([rank for rank in ranks if rank is not None], view.key)
            gather = gatherer(meeting_board(config, member, view), part.rank, part.size, config.timeout)
            return Renewed(part, (0,) * part.size, gather)

        return take(gathers(rank), rank, [0] * size, None, within if transport == "local" else partial(again, anew))

    return take_seat


def _gathers(size: int, timeout: float) -> Callable[[int], Gather]:
    """Returns a function that gives each of `size` threads its `Gather`."""
    texts = [""] * size
    meeting = threading.Barrier(size)

    def of(rank: int) -> Gather:
        def gather(text: str) -> list[str]:
            texts[rank] = text
            meeting.wait(timeout)
            everyone = list(texts)
            meeting.wait(timeout)
            return everyone

        return gather

    return of


def _torch_p2p(size: int, timeout: float) -> Callable[[int], Transport]:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    from ringred.transports.torch_p2p import TorchP2PTransport

    store = HashStore()
    return lambda rank: TorchP2PTransport(store, rank, size, timeout, "127.0.0.1")


def _shm(
    size: int, timeout: float, compiled: bool, driver: Callable[[int], Driver] | None
) -> Callable[[int], Transport]:
    from ringred.transports import neighbours, shm_player
    from ringred.transports.shm import ShmTransport

    if size == 1:
        return Hub(1).transport
    gathers = _gathers(size, timeout)

    def make(rank: int) -> Transport:
        found, reason = neighbours.connect(gathers(rank), rank, compiled and shm_player.unusable() is None)
        if found is None:
            raise TransportUnavailable(f"rank {rank}: no shared memory: {reason}")
        near = ShmTransport(found, range(size), "world", timeout)
        if driver is None:
            return near
        on_device = near.on_device(lambda: driver(rank), "world on a device")
        near.close()
        return on_device

    return make
