"""Taking part: servers in the ranks of a communicator, each of the first ranks with a shard, or servers elsewhere."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ringred.communicator import Communicator, default_communicator
from ringred.errors import PolicyError, RingredError
from ringred.parameter_server.agreeing import gathered, together
from ringred.parameter_server.catalog import Placing
from ringred.parameter_server.coordinator import Coordinator, StalenessAware
from ringred.parameter_server.encoding import encoding_of
from ringred.parameter_server.keys import Keys, make_keys
from ringred.parameter_server.meeting import find_servers
from ringred.parameter_server.messages import Apply
from ringred.parameter_server.partition import SEALED_BYTES
from ringred.parameter_server.policies import Async, Policy
from ringred.parameter_server.price import cheaper
from ringred.parameter_server.server import Server
from ringred.parameter_server.serving import check_every
from ringred.parameter_server.worker import Worker
from ringred.runtime import lifetime
from ringred.runtime.select import machine_model
from ringred.runtime.trace import Tracer
from ringred.topology.detect import host_name

__all__ = ["Membership", "Placement"]


class Placement(NamedTuple):
    """Where the servers are.

    In the first `shards` ranks of `comm` (None: all ranks of `ringred.init()`), under `policy`. Or, if `servers` is
    given, in processes of their own, which have the policy: the folder where they meet, or their addresses and the
    job's `keys`; `worker` is this worker's number (default: its rank). With `replicate` each server has a copy on the
    next one, and the death of one loses nothing that was acknowledged. Tensors go through shared memory where workers
    and servers are on one host, unless `shared` is False; messages are encrypted, unless `encrypt` is False and all
    ranks are on one host. `timeout` is in seconds.

    After each `every` updates the servers write a snapshot to the folder `snapshots`, which all of them see; if there
    is one when they start, they go on from it.

    With `hierarchy="host"` the ranks of each host, which have to be as many on each, are one worker, which `policy`
    counts as one: gradients are reduced inside the host first, and each rank pushes and pulls its share. "auto" does so
    where the cost model says that a synchronous round is faster. Servers of their own are told how many ranks that are.
    """

    policy: Policy | None = None
    shards: int | None = None
    updates: int | None = None
    staleness_aware: StalenessAware | None = None
    comm: Any = None
    servers: str | Path | Sequence[str] | None = None
    keys: Keys | None = None
    worker: int | None = None
    replicate: bool = False
    encrypt: bool = True
    shared: bool = True
    timeout: float | None = None
    snapshots: str | Path | None = None
    every: int | None = None
    hierarchy: Literal["flat", "host", "auto"] = "flat"


class Hosted(NamedTuple):
    """The addresses of all servers, the keys to talk to them, and the server that this rank hosts, if it does."""

    addresses: list[str]
    keys: Keys | None
    server: Server | None


class Membership:
    """This process as a worker, and as a server if its rank hosts a shard. Collective where servers are in ranks."""

    def __init__(self, placement: Placement, compression: str | None = None, nbytes: int = 0) -> None:
        encoding = encoding_of(compression)
        timeout = placement.timeout
        self._worker: Worker | None = None
        self.local: Communicator | None = None
        self.tracer: Tracer | None = None
        comm = None
        if placement.servers is None or placement.worker is None or placement.hierarchy != "flat":
            comm = default_communicator(placement.comm)
            number, self.tracer = comm.rank, comm.tracer
        if comm is not None and _by_host(comm, placement, nbytes):
            self.local = comm.split(comm.hosts[comm.rank])
            number = comm.hosts[comm.rank]
        if placement.servers is None:
            assert comm is not None
            timeout = comm.config.timeout if timeout is None else timeout
            self._hosted = _in_ranks(comm, placement, 1 if self.local is None else self.local.size)
        else:
            timeout = 60.0 if timeout is None else timeout
            self._hosted = _elsewhere(placement, timeout)
        if placement.worker is not None:
            number = placement.worker
        try:
            hosted, local = self._hosted, self.local
            options: Any = {"keys": hosted.keys, "timeout": timeout, "shared": placement.shared, "encoding": encoding}
            if local is None:
                self._worker = Worker(number, hosted.addresses, **options)
            else:
                local.set_timeout(2 * timeout)  # the first rank may wait as long for the servers
                self._worker = self._of_host(local, number, hosted.addresses, options)
        except BaseException:
            self.close()
            raise

    def _of_host(self, local: Communicator, number: int, addresses: list[str], options: dict[str, Any]) -> Worker:
        """The first rank says hello; the others push and pull as the same worker."""
        first = together(local, lambda: Worker(number, addresses, **options) if local.rank == 0 else None)
        told = gathered(local, first.told if first is not None else "")[0]
        worker = first or Worker(number, addresses, **options, told=told)
        if worker.shares != local.size:
            worker.connection.close()
            raise PolicyError(
                f"the servers expect {worker.shares} ranks on each host, and {host_name()} has {local.size}: "
                "ringred serve takes their number as --ranks-per-host"
            )
        return worker

    def recorded(self, name: str) -> AbstractContextManager[None]:
        """Records what happens within it in the communicator's trace, if there is one."""
        return nullcontext() if self.tracer is None else self.tracer.record("parameter_server", name)

    def in_turn(self, act: Callable[[], None]) -> None:
        """Runs `act`, on the first rank of the host before the others."""
        if self.local is None:
            act()
        else:
            local = self.local
            together(local, lambda: act() if local.rank == 0 else None)
            together(local, lambda: act() if local.rank > 0 else None)

    @property
    def worker(self) -> Worker:
        """Raises `RingredError` once this is closed."""
        if self._worker is None:
            raise RingredError("this parameter server is closed")
        return self._worker

    def close(self) -> None:
        """Leaves. Where this rank hosts a shard, waits until all workers have left. In a `finally` that runs because of
        an exception the others hear of it."""
        failure = lifetime.ending_with()
        because = "" if failure is None else f"{type(failure).__name__}: {failure}"
        worker, self._worker = self._worker, None
        server = self._hosted.server
        self._hosted = self._hosted._replace(server=None)
        if worker is not None:
            worker.close(last=server is not None and not because, because=because)
        if server is not None:
            server.close(f"raised {because}" if because else "", others_end=not because)


def _elsewhere(placement: Placement, timeout: float) -> Hosted:
    own = ("policy", "shards", "updates", "staleness_aware", "snapshots", "every")
    given = [name for name in own if getattr(placement, name) is not None]
    if given:
        raise PolicyError(f"{', '.join(given)}: the servers' own; give it to ringred serve")
    if isinstance(placement.servers, (str, Path)):
        return Hosted(*find_servers(placement.servers, timeout), None)
    return Hosted(list(placement.servers or ()), placement.keys, None)


def _by_host(comm: Communicator, placement: Placement, nbytes: int) -> bool:
    """Whether the ranks of each host are one worker."""
    if placement.hierarchy not in ("flat", "host", "auto"):
        raise PolicyError(f"hierarchy: expected 'flat', 'host' or 'auto', got {placement.hierarchy!r}")
    if placement.hierarchy == "auto":
        shards = comm.size if placement.shards is None else placement.shards
        model = machine_model(comm.transport.model, comm.hosts, comm.tuning)
        enough = placement.policy is None or placement.policy.fewest <= len(set(comm.hosts))
        return enough and cheaper(nbytes, comm.hosts, max(1, min(shards, comm.size)), model)
    ranks = set(Counter(comm.hosts).values())
    if placement.hierarchy == "host" and len(ranks) > 1:
        raise PolicyError(f"rank {comm.rank}: hosts with {sorted(ranks)} ranks; hierarchy='host' needs as many on each")
    return placement.hierarchy == "host"


def _in_ranks(comm: Communicator, placement: Placement, shares: int) -> Hosted:
    """Starts the servers and tells all ranks where they are. Collective."""
    policy = placement.policy or Async()
    shards = comm.size if placement.shards is None else placement.shards
    if not 1 <= shards <= comm.size:
        raise PolicyError(f"rank {comm.rank}: {shards} shards in {comm.size} ranks; expected 1 to {comm.size}")
    workers = comm.size // shares
    if policy.fewest > workers:
        raise PolicyError(f"rank {comm.rank}: {policy} needs {policy.fewest} workers, and there are {workers}")
    check_every(placement.every, placement.snapshots)
    snapshots = None if placement.snapshots is None else str(Path(placement.snapshots).absolute())
    keys = _same_keys(comm) if placement.encrypt or len(set(comm.hosts)) > 1 else None
    placing = Placing(shares, SEALED_BYTES if len(set(comm.hosts)) > 1 else None)
    server = None
    if comm.rank < shards:

        def coordinator() -> Coordinator:
            options: Any = {"updates": placement.updates, "staleness_aware": placement.staleness_aware}
            options |= {"snapshots": snapshots, "every": placement.every, "placing": placing}
            return Coordinator(copy.deepcopy(policy), workers, shards, **options)

        options: Any = {"replicate": placement.replicate, "shared": placement.shared}
        options |= {"snapshots": snapshots, "placing": placing, "on_update": _traced(comm)}
        server = Server(comm.rank, shards, coordinator, listen=_listen(comm), keys=keys, **options)
    addresses = [text for text in gathered(comm, "" if server is None else server.address) if text]
    if server is not None:
        server.start(addresses)
    return Hosted(addresses, keys, server)


def _traced(comm: Communicator) -> Callable[[Apply], None] | None:
    """Records each update, and how stale its gradients were."""
    tracer = comm.tracer
    if tracer is None:
        return None

    def on_update(apply: Apply) -> None:
        staleness = {gradient.worker: apply.version - 1 - gradient.version for gradient in apply.gradients}
        told = {"staleness": staleness, "mean_staleness": sum(staleness.values()) / len(staleness)}
        tracer.instant("parameter_server", f"update {apply.version}", time.monotonic_ns(), "updates", **told)

    return on_update


def _listen(comm: Communicator) -> str | None:
    """An address that all ranks reach."""
    return None if len(set(comm.hosts)) == 1 else f"tcp://{comm.config.interface or _own_address()}:*"


def _own_address() -> str:
    """This host's address on the network, as its name is resolved."""
    import socket

    return socket.getaddrinfo(host_name(), None, type=socket.SOCK_STREAM)[0][4][0]  # type: ignore[return-value]


def _same_keys(comm: Communicator) -> Keys:
    """Rank 0's new keys, on every rank."""
    (text, *_) = gathered(comm, make_keys().as_text() if comm.rank == 0 else "")
    return Keys.from_text(text)
