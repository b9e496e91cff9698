"""Taking part: servers in the ranks of a communicator, each of the first ranks with a shard, or servers elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ringred.communicator import Communicator, default_communicator
from ringred.errors import PolicyError, RingredError
from ringred.parameter_server.coordinator import Coordinator, StalenessAware
from ringred.parameter_server.encoding import encoding_of
from ringred.parameter_server.keys import Keys, make_keys
from ringred.parameter_server.policies import Async, Policy
from ringred.parameter_server.server import Server
from ringred.parameter_server.serving import check_every, find_servers
from ringred.parameter_server.worker import Worker
from ringred.runtime import lifetime
from ringred.topology.detect import host_name

__all__ = ["Membership", "Placement"]

_CARD = 1024  # bytes of a rank's text


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


class Hosted(NamedTuple):
    """The addresses of all servers, the keys to talk to them, and the server that this rank hosts, if it does."""

    addresses: list[str]
    keys: Keys | None
    server: Server | None


class Membership:
    """This process as a worker, and as a server if its rank hosts a shard. Collective where servers are in ranks."""

    def __init__(self, placement: Placement, compression: str | None = None) -> None:
        encoding = encoding_of(compression)
        number, timeout = placement.worker, placement.timeout
        if placement.servers is None:
            comm = default_communicator(placement.comm)
            number = comm.rank
            timeout = comm.config.timeout if timeout is None else timeout
            self._hosted = _in_ranks(comm, placement)
        else:
            timeout = 60.0 if timeout is None else timeout
            self._hosted = _elsewhere(placement, timeout)
            number = default_communicator(placement.comm).rank if number is None else number
        self._worker: Worker | None = None
        try:
            hosted = self._hosted
            self._worker = Worker(
                number, hosted.addresses, keys=hosted.keys, timeout=timeout, shared=placement.shared, encoding=encoding
            )
        except BaseException:
            self.close()
            raise

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
            server.close(f"raised {because}" if because else "")


def _elsewhere(placement: Placement, timeout: float) -> Hosted:
    own = ("policy", "shards", "updates", "staleness_aware", "snapshots", "every")
    given = [name for name in own if getattr(placement, name) is not None]
    if given:
        raise PolicyError(f"{', '.join(given)}: the servers' own; give it to ringred serve")
    if isinstance(placement.servers, (str, Path)):
        return Hosted(*find_servers(placement.servers, timeout), None)
    return Hosted(list(placement.servers or ()), placement.keys, None)


def _in_ranks(comm: Communicator, placement: Placement) -> Hosted:
    """Starts the servers and tells all ranks where they are. Collective."""
    policy = placement.policy or Async()
    shards = comm.size if placement.shards is None else placement.shards
    if not 1 <= shards <= comm.size:
        raise PolicyError(f"rank {comm.rank}: {shards} shards in {comm.size} ranks; expected 1 to {comm.size}")
    if policy.fewest > comm.size:
        raise PolicyError(f"rank {comm.rank}: {policy} needs {policy.fewest} workers, and there are {comm.size}")
    check_every(placement.every, placement.snapshots)
    snapshots = None if placement.snapshots is None else str(Path(placement.snapshots).absolute())
    keys = _same_keys(comm) if placement.encrypt or len(set(comm.hosts)) > 1 else None
    server = None
    if comm.rank < shards:

        def coordinator() -> Coordinator:
            options: Any = {"updates": placement.updates, "staleness_aware": placement.staleness_aware}
            options |= {"snapshots": snapshots, "every": placement.every}
            return Coordinator(copy.deepcopy(policy), comm.size, shards, **options)

        options: Any = {"replicate": placement.replicate, "shared": placement.shared, "snapshots": snapshots}
        server = Server(comm.rank, shards, coordinator, listen=_listen(comm), keys=keys, **options)
    addresses = [text for text in _gathered(comm, "" if server is None else server.address) if text]
    if server is not None:
        server.start(addresses)
    return Hosted(addresses, keys, server)


def _listen(comm: Communicator) -> str | None:
    """An address that all ranks reach."""
    return None if len(set(comm.hosts)) == 1 else f"tcp://{comm.config.interface or _own_address()}:*"


def _own_address() -> str:
    """This host's address on the network, as its name is resolved."""
    import socket

    return socket.getaddrinfo(host_name(), None, type=socket.SOCK_STREAM)[0][4][0]  # type: ignore[return-value]


def _same_keys(comm: Communicator) -> Keys:
    """Rank 0's new keys, on every rank."""
    (text, *_) = _gathered(comm, make_keys().as_text() if comm.rank == 0 else "")
    return Keys.from_text(text)


def _gathered(comm: Communicator, text: str) -> list[str]:
    """The text of every rank."""
    data = text.encode()
    if len(data) > _CARD:
        raise ValueError(f"rank {comm.rank}: a text of {len(data)} bytes; there is room for {_CARD}")
    own = torch.zeros(_CARD, dtype=torch.uint8)
    own[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    everyone = torch.empty(_CARD * comm.size, dtype=torch.uint8)
    comm.all_gather(everyone, own)
    return [bytes(card.tolist()).rstrip(b"\0").decode() for card in everyone.view(comm.size, _CARD)]
