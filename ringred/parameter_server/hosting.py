"""Servers in the ranks of a communicator: each of the first ranks hosts a shard, rank 0 the coordinator too."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ringred.communicator import Communicator
from ringred.errors import PolicyError
from ringred.parameter_server.coordinator import Coordinator, StalenessAware
from ringred.parameter_server.keys import Keys, make_keys
from ringred.parameter_server.policies import Policy
from ringred.parameter_server.server import Server
from ringred.topology.detect import host_name

__all__ = ["Hosted", "in_ranks"]

_CARD = 1024  # bytes of a rank's text


class Hosted(NamedTuple):
    """The addresses of all servers, the keys to talk to them, and the server that this rank hosts, if it does."""

    addresses: list[str]
    keys: Keys | None
    server: Server | None


def in_ranks(
    comm: Communicator,
    policy: Policy,
    shards: int,
    *,
    updates: int | None = None,
    staleness_aware: StalenessAware | None = None,
    encrypt: bool = True,
    shared: bool = True,
) -> Hosted:
    """Starts `shards` servers, in the first ranks of `comm`, and tells all ranks where they are. Collective."""
    if not 1 <= shards <= comm.size:
        raise PolicyError(f"rank {comm.rank}: {shards} shards in {comm.size} ranks; expected 1 to {comm.size}")
    if policy.fewest > comm.size:
        raise PolicyError(f"rank {comm.rank}: {policy} needs {policy.fewest} workers, and there are {comm.size}")
    keys = _same_keys(comm) if encrypt or len(set(comm.hosts)) > 1 else None
    server = None
    if comm.rank < shards:
        coordinator = None
        if comm.rank == 0:
            coordinator = Coordinator(policy, comm.size, shards, updates=updates, staleness_aware=staleness_aware)
        server = Server(comm.rank, shards, coordinator=coordinator, listen=_listen(comm), keys=keys, shared=shared)
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
