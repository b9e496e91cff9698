"""`ringred.init()`: the communicator of the ranks that the launcher started, and the process's default one."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from types import TracebackType
from typing import Any

from ringred.communicator import Communicator, abort_all
from ringred.errors import TransportUnavailable
from ringred.runtime.config import Config, Launch, detect_launch
from ringred.transports.local import Hub

__all__ = ["default_communicator", "init"]

_GRACE_SECONDS = 1.0  # for peers to say what they saw before MPI ends the job

_lock = threading.Lock()
_default: Communicator | None = None
_reports_uncaught = False
_of_groups: weakref.WeakKeyDictionary[Any, Communicator] = weakref.WeakKeyDictionary()


def init(*, trace: str | None = None) -> Communicator:
    """The communicator of all ranks that the launcher started; the second call returns the same one.

    MPI under mpirun and srun; torch's store, and Gloo, under torchrun or anything else that sets RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or where `torch.distributed` is initialised already; one rank
    otherwise. `RINGRED_TRANSPORT` overrules. `trace` names a Chrome trace to write. Collective.

    From here on an exception that ends this process is reported to all other ranks, which raise as well.
    """
    global _default
    with _lock:
        if _default is not None and not _default.closed:
            return _default
        _default = _connect(Config.from_environment())
        if trace is not None:
            _default.start_trace(trace)
        _report_uncaught()
        return _default


def default_communicator(group: Any = None) -> Communicator:
    """What DDP uses: `init()`'s communicator, else the ranks of torch's default process group, else `init()`."""
    if isinstance(group, Communicator):
        return group
    if group is None:
        return init()
    with _lock:
        known = _of_groups.get(group)
        if known is None or known.closed:
            known = _of_groups[group] = Communicator.from_process_group(group)
        return known


def _connect(config: Config) -> Communicator:
    launch = detect_launch()
    comm = _by_launcher(config, launch)
    if comm.size != launch.size and not _torch_group_exists():
        comm.close()
        raise TransportUnavailable(
            f"the launcher started {launch.size} ranks, but {comm.transport.name} connects {comm.size}: is this "
            "mpirun of another MPI than mpi4py's (ringred doctor tells), or RINGRED_TRANSPORT set for another launcher?"
        )
    return comm


def _by_launcher(config: Config, launch: Launch) -> Communicator:
    kind = {"mpi": "mpi", "torch_p2p": "store"}.get(config.transport or "", launch.kind)
    if config.transport is None and _torch_group_exists():
        return Communicator.from_process_group(config=config)
    if kind == "mpi":
        return Communicator.from_mpi(config=config)
    if kind == "store":
        from ringred.transports.torch_p2p import rendezvous

        store = rendezvous(config.timeout, launch.restart)
        return Communicator.from_store(store, launch.rank, launch.size, config=config)
    return Communicator(Hub(1).transport(0), config=config)


def _torch_group_exists() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _report_uncaught() -> None:
    """Makes an uncaught exception known to the peers: a rank that just ended would leave them waiting."""
    global _reports_uncaught
    if _reports_uncaught:
        return
    _reports_uncaught = True
    earlier = sys.excepthook

    def report(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        earlier(kind, value, traceback)
        sys.stderr.flush()
        abort_all(value)
        if _default is not None and getattr(_default.transport, "far", _default.transport).name == "mpi":
            # MPI's own end waits for all ranks, and they may wait for this one.
            from ringred.transports.mpi import abort_job

            time.sleep(_GRACE_SECONDS)
            abort_job(1)

    sys.excepthook = report
