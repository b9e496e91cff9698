"""The public `Communicator`: collectives over a group of ranks, blocking or asynchronous, by any algorithm."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ringred.errors import UnsupportedTensor
from ringred.runtime import connect, lifetime, probe
from ringred.runtime.choosing import Choosing
from ringred.runtime.config import Config, cache_folder
from ringred.runtime.operations import Operations
from ringred.runtime.planner import Planner
from ringred.runtime.renewing import Renewing
from ringred.runtime.runner import Runner
from ringred.runtime.seat import Seat
from ringred.runtime.tensors import over_host_memory
from ringred.runtime.trace import Tracer
from ringred.topology.calibrate import Tuning
from ringred.transports.base import Counters, Transport, Windowed
from ringred.transports.cuda import joining

__all__ = ["Communicator", "default_communicator", "init"]


class Communicator(Operations, Choosing, Renewing):
    """`size` ranks that reach each other over `transport`; this process is `rank`.

    Create it with `ringred.init()`, `from_mpi`, `from_store` or `from_process_group`. All ranks must call the same
    collectives in the same order; if they do not, every rank raises an exception. Calls run one at a time: calls
    from several threads are put into one order, which must be the same on all ranks. After a failure a communicator
    stays unusable: each further call raises an exception that gives the reason.

    The collectives are in `Operations`; this class makes communicators, chooses algorithms, and ends.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        hosts: Sequence[int] | None = None,
        config: Config | None = None,
        name: str = "world",
        device: torch.device | None = None,
        seat: Seat | None = None,
    ) -> None:
        self.config = config or Config.from_environment()
        self.rank, self.size, self.name = transport.rank, transport.size, name
        self.hosts = tuple(hosts) if hosts is not None else (0,) * transport.size
        self.transport = transport
        self.tuning: Tuning = {}
        segment_bytes = self.config.segment_bytes or transport.segment_bytes
        self._planner = Planner(
            name,
            self.rank,
            self.size,
            self.hosts,
            self._models(),
            segment_bytes,
            windows=cast(Windowed, transport) if transport.windows else None,
            buffers=transport.buffers and segment_bytes <= transport.segment_bytes,
            depth=transport.depth,
            can_native=getattr(transport, "can_all_reduce", None),
            device=device,
            over=self._over(transport, device),
        )
        self._devices: dict[torch.device, Communicator] = {}
        self._sides: list[Communicator] = []
        self._tries = 0  # how often such a side was asked for
        self._making = threading.RLock()
        self._above: Communicator | None = None  # the one that it is a part of, or a duplicate
        self._runner = Runner(transport, self.config.timeout, name, self.config.blocking, self.config.sites)
        self._take_seat(seat, self.config.stall_seconds)
        self._splits = 0
        self._children: weakref.WeakSet[Communicator] = weakref.WeakSet()
        if self.config.trace and name == "world":
            self.start_trace(self.config.trace)
        self._born_under = id(sys.exc_info()[1])  # an exception that was there before has nothing to do with it
        lifetime.live.add(self)

    # ------------------------------------------------------------------ making communicators

    @classmethod
    def from_mpi(cls, comm: Any = None, *, config: Config | None = None) -> Communicator:
        """Makes a communicator from duplicates of an mpi4py communicator (default: `COMM_WORLD`). Collective.

        Raises `TransportUnavailable` where mpi4py or an MPI library is missing.
        """
        config = config or Config.from_environment()
        return cls._tuned(connect.by_mpi(comm, config), config)

    @classmethod
    def from_store(cls, store: Any, rank: int, size: int, *, config: Config | None = None) -> Communicator:
        """Makes a communicator from a torch store (`torch.distributed.Store`) shared by all `size` ranks. Collective.

        Gloo connects the ranks. Raises `TransportUnavailable` if not all ranks join before the timeout.
        """
        config = config or Config.from_environment()
        return cls._tuned(connect.by_store(store, rank, size, config), config)

    @classmethod
    def from_process_group(cls, group: Any = None, *, config: Config | None = None) -> Communicator:
        """Makes a communicator of the ranks of a torch process group (default group if None), using its store.

        Collective.
        """
        config = config or Config.from_environment()
        return cls._tuned(connect.by_process_group(group, config), config)

    @classmethod
    def _tuned(cls, connected: connect.Connected, config: Config) -> Communicator:
        comm = cls(connected.transport, hosts=connected.hosts, config=config, seat=connected.seat)
        probe.tune(comm, connected.gather)
        connected.leave()
        return comm

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """Makes one communicator for each `color`, of the ranks that pass it, ordered by (`key`, rank). Collective.

        Like `MPI_Comm_split`. Returns None on ranks that pass None as `color`.
        """
        mine = torch.tensor([-1 if color is None else color, key], dtype=torch.int64, device=self._planner.device)
        if color is not None and color < 0:
            raise ValueError(f"split: expected a color ≥ 0 or None, got {color}")
        table = mine.new_empty(2 * self.size)
        self.all_gather(table, mine)
        self._splits += 1
        if color is None:
            return None
        rows = table.view(self.size, 2).tolist()
        members = [rank for _, rank in sorted((rows[r][1], r) for r in range(self.size) if rows[r][0] == color)]
        return self.subset(members, f"{self.name}/{self._splits}.{color}")

    def subset(self, members: Sequence[int], name: str, *, timeout: float | None = None) -> Communicator:
        """A communicator of `members`, ranks of this one, in that order. Only the members call it, with a `name` that
        they have given to no other. Its collectives may take `timeout` seconds, or as long as those of this one."""
        config = self.config if timeout is None else replace(self.config, timeout=timeout)
        transport = self.transport.subset(members, name)
        hosts = [self.hosts[rank] for rank in members]
        seat = None if self.seat is None else self.seat.part(name, members)
        child = Communicator(transport, hosts=hosts, config=config, name=name, device=self._planner.device, seat=seat)
        child.tune(self.tuning)
        child._above = self
        self._children.add(child)
        return child

    def duplicate(self) -> Communicator:
        """A communicator of the same ranks, with its own counters, as `MPI_Comm_dup`. Its collectives may run at the
        same time as those of this one, in any order. Collective."""
        self._splits += 1
        return self.subset(range(self.size), f"{self.name}/{self._splits}")

    def set_timeout(self, seconds: float) -> None:
        """From now on, a collective fails if it takes longer than `seconds`."""
        self.config = replace(self.config, timeout=seconds)
        self._runner.set_timeout(seconds)
        for there in self._sides:
            there.set_timeout(seconds)

    def _on(self, device: torch.device) -> Communicator:
        """The same ranks, each with its device, for tensors there; made at the first call, which is collective.

        Raises `TransportUnavailable`, on every rank, where one of them has no such device or cannot use it.
        """
        if device.type not in joining.DRIVERS:
            raise UnsupportedTensor(f"rank {self.rank}: expected tensors of the CPU or of CUDA, got them on {device}")
        device = joining.with_index(device)
        with self._making:
            there = self._devices.get(device)
            if there is None:
                make, cache = joining.DRIVERS[device.type], cache_folder()
                there = self._devices[device] = self.on_device(lambda: make(device, cache), device)
                if self._above is None:
                    probe.tune(there, connect.gatherer(self.size, self.all_gather), f" on {joining.named(device)}")
                elif device in self._above._devices:
                    there.tune(self._above._devices[device].tuning)
        return there

    def on_device(self, driver: Callable[[], Any], device: torch.device) -> Communicator:
        """A communicator of the same ranks whose tensors are on the device of each rank's `driver`
        (`transports.cuda.driver`). Collective. It fails with this one, and is closed with it."""
        self._sides = [there for there in self._sides if not there.closed]
        self._tries += 1
        name = f"{self.name} on {device.type} {self._tries}"
        transport = joining.transport(self.transport, driver, name, self.config.timeout)
        there = Communicator(transport, hosts=self.hosts, config=self.config, name=name, device=device)
        self._sides.append(there)
        self._runner.followers.append(there.abort)
        return there

    @property
    def runner(self) -> Runner:
        """What runs its collectives."""
        return self._runner

    def runner_on(self, device: torch.device) -> Runner:
        """What runs the collectives on tensors of `device`. The first call for it is collective."""
        return self._runner if device == self._planner.device else self._on(device)._runner

    def synchronize(self) -> None:
        """Returns once the device has done all collectives that this rank has started here, as `torch.cuda.synchronize`
        for them alone. Raises what they raise."""
        for comm in (self, *self._sides):
            comm._runner.synchronize()

    # ------------------------------------------------------------------ properties and traces

    @property
    def device(self) -> torch.device:
        """Where the tensors of its collectives are; the CPU's communicator takes those of devices too."""
        return self._planner.device

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this rank's host, itself among them."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    @property
    def counters(self) -> Counters:
        """Messages and bytes that this rank has sent and received so far, of tensors of a device too."""
        mine = self.transport.counters
        return sum((there.transport.counters for there in self._sides), mine) if self._sides else mine

    @staticmethod
    def _over(transport: Transport, device: torch.device | None) -> Callable[[int, int, torch.dtype], Tensor] | None:
        if device is None or device.type == "cpu":
            return over_host_memory
        return None if transport.queue is None else transport.queue.over

    @property
    def tracer(self) -> Tracer | None:
        """The collector of events, while a trace is made."""
        return self._runner.tracer

    def start_trace(self, path: str) -> Tracer:
        """Starts recording events; `close()` writes them as a Chrome trace to `path` (see `trace.trace_path`)."""
        tracer = self._runner.tracer = Tracer(self.rank, self.size, path)
        return tracer

    @contextmanager
    def for_purpose(self, purpose: str) -> Iterator[None]:
        """Calls that this thread makes within it only meet calls for the same `purpose` on other ranks: it is part of
        their contracts, and errors name it. One thread at a time."""
        with contextlib.ExitStack() as restored:
            for runner in (self._runner, *(there._runner for there in self._sides)):
                restored.enter_context(runner.order)
                runner.purpose = purpose
                restored.callback(setattr, runner, "purpose", "")
            yield

    # ------------------------------------------------------------------ ending

    @property
    def closed(self) -> bool:
        return self._runner.closed

    def abort(self, cause: BaseException) -> None:
        """Tells every rank that this one failed with `cause` and takes no further part; they all raise."""
        self._runner.abort(cause)
        if self.seat is not None:
            self.seat.member.leave(self.seat.view)
        for child in list(self._children):
            child.abort(cause)

    def close(self) -> None:
        """Finishes what is in flight and gives everything back. A second call does nothing.

        In a `finally` or `except` of the function that an exception came through it is `abort` as well, so that the
        other ranks hear of the exception. Raises `CollectiveMismatch` where only now it shows that the ranks did not
        make the same calls.
        """
        failure = None if self.closed else lifetime.ending_with()
        if failure is not None and id(failure) != self._born_under:
            self.abort(failure)
        with contextlib.ExitStack() as ending:
            ending.callback(self._leave_seat)
            ending.callback(self._runner.close)
            for there in self._sides:
                ending.callback(there.close)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> None:
        last = self.newest()
        if value is not None:
            last.abort(value)
        last.close()

    def __deepcopy__(self, memo: Any) -> Communicator:
        return self  # a copy of a module uses the same communicator as the original

    def __repr__(self) -> str:
        return f"<Communicator {self.name}: rank {self.rank} of {self.size} over {self.transport.name}>"


# ---------------------------------------------------------------------- the process's own


_lock = threading.Lock()
_default: Communicator | None = None
_default_group: weakref.ref[Any] | None = None  # torch's default group, if the ranks of `_default` are its
_of_groups: weakref.WeakKeyDictionary[Any, Communicator] = weakref.WeakKeyDictionary()


def init(*, trace: str | None = None) -> Communicator:
    """The communicator of all ranks that the launcher started; the second call returns the same one.

    If the program has initialised `torch.distributed`, these are the ranks of its default group; if that is another one
    by now, a new communicator is made. Otherwise mpirun and srun connect them by MPI. torchrun, and anything else that
    sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, connects them by torch's store and Gloo. Without a launcher
    there is one rank. The variable RINGRED_TRANSPORT takes precedence. `trace` names a Chrome trace to write.
    Collective.

    From here on an exception that ends this process is reported to all other ranks, which raise as well.
    """
    global _default, _default_group
    with _lock:
        group = connect.torch_group()
        _default = None if _default is None else _default.newest()
        if _default is not None and not _default.closed and _fits(_default, group):
            return _default
        _default_group = None if group is None else weakref.ref(group)
        config = Config.from_environment()
        comm = _default = Communicator._tuned(connect.by_launcher(config), config)
        if trace is not None:
            comm.start_trace(trace)
        lifetime.report_uncaught(lambda: None if _default is None else connect.end_job(_default.transport))
        return comm


def _fits(comm: Communicator, group: Any) -> bool:
    """Whether `comm`, made by an earlier `init`, connects the ranks of torch's default group of now."""
    if group is None:
        return True
    if _default_group is not None:
        return _default_group() is group
    return comm.size == int(group.size())  # the launcher's ranks are torch's, by whatever way they were connected


def default_communicator(group: Any = None) -> Communicator:
    """`group` itself if it is a communicator, the ranks of a torch process group, or, for None, what `init()` gives."""
    if isinstance(group, Communicator):
        return group
    if group is None:
        return init()
    with _lock:
        known = _of_groups.get(group)
        known = None if known is None else known.newest()
        if known is None or known.closed:
            known = Communicator.from_process_group(group)
        _of_groups[group] = known
        return known
