"""Servers in processes of their own: `ringred serve`, and how workers find them.

They meet in a folder that all of them see (each server writes its address there, and server 0 the keys), or at
addresses that everybody is told.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ringred.errors import CollectiveTimeout, PolicyError, TransportUnavailable
from ringred.parameter_server.coordinator import Coordinator, StalenessAware
from ringred.parameter_server.keys import Keys, load_keys, make_keys, save_keys
from ringred.parameter_server.policies import Policy
from ringred.parameter_server.server import Server

__all__ = ["check_every", "find_servers", "serve"]

_KEYS = "keys.json"
_PATIENCE = 60.0  # seconds to wait for the other servers
_RETURN = 60.0  # seconds in which workers that died may come back when none is left


def find_servers(folder: str | Path, timeout: float = _PATIENCE) -> tuple[list[str], Keys]:
    """The addresses of the servers that meet in `folder`, and their keys. Waits until all are there; raises
    `CollectiveTimeout` after `timeout` seconds."""
    folder, deadline = Path(folder), time.monotonic() + timeout
    while True:
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("server-*.json"))]
        expected = found[0]["shards"] if found else 0
        addresses = {card["number"]: card["address"] for card in found if card["shards"] == expected}
        if found and len(addresses) == expected and (folder / _KEYS).exists():
            return [addresses[number] for number in range(expected)], load_keys(folder / _KEYS)
        if time.monotonic() > deadline:
            missing = sorted(set(range(expected)) - addresses.keys()) if found else "all"
            raise CollectiveTimeout(
                f"no servers in {folder} after {timeout:g} s: missing {missing}; is ringred serve up?"
            )
        time.sleep(0.05)


def serve(
    policy: Policy,
    workers: int,
    *,
    number: int = 0,
    shards: int = 1,
    folder: Path | None = None,
    addresses: Sequence[str] = (),
    listen: str | None = None,
    keys: Keys | None = None,
    updates: int | None = None,
    staleness_aware: StalenessAware | None = None,
    replicate: bool = False,
    snapshots: Path | None = None,
    every: int | None = None,
    ranks_per_host: int = 1,
    told: Callable[[str], None] = print,
) -> int:
    """Hosts shard `number` until all workers have left, or a signal ends it; server 0 has the policy. Returns 0."""
    if (folder is None) == (not addresses):
        raise PolicyError("serve: servers meet in a folder, or at addresses that are all given: exactly one of the two")
    if addresses and len(addresses) != shards:
        raise PolicyError(f"serve: {shards} shards, and {len(addresses)} addresses")
    if not 0 <= number < shards:
        raise PolicyError(f"serve: number {number} of {shards} shards; expected 0 to {shards - 1}")
    if policy.fewest > workers:
        raise PolicyError(f"serve: {policy} needs {policy.fewest} workers, and there are {workers}")
    check_every(every, snapshots)
    place = None if snapshots is None else str(snapshots.absolute())
    if folder is not None:
        keys = _keys_in(folder, number) if keys is None else keys
    elif keys is None:
        raise PolicyError("serve: at given addresses, --keys has to name a file of keys; ringred keys makes one")

    def coordinator() -> Coordinator:
        aware = staleness_aware
        options: Any = {"updates": updates, "staleness_aware": aware, "snapshots": place, "every": every}
        options["shares"] = ranks_per_host
        return Coordinator(copy.deepcopy(policy), workers, shards, **options)

    own = listen or _own(addresses, number)
    ways: Any = {"replicate": replicate, "snapshots": place, "shares": ranks_per_host}
    server = Server(number, shards, coordinator, listen=own, keys=keys, **ways)
    ended = threading.Event()
    try:
        for which in (signal.SIGTERM, signal.SIGINT):
            signal.signal(which, lambda *_: ended.set())
        if folder is not None:
            _write(folder / f"server-{number}.json", {"number": number, "shards": shards, "address": server.address})
            addresses, _ = find_servers(folder)
        server.start(addresses)
        told(f"ringred: server {number} of {shards} listens on {server.address}")
        while not ended.wait(0.1) and not server.done(_RETURN):
            pass
        if server.coordinator is not None:
            told(f"ringred: {json.dumps(server.coordinator.report())}")
    finally:
        server.close("was ended" if ended.is_set() else "")
        if folder is not None:
            (folder / f"server-{number}.json").unlink(missing_ok=True)
            if number == 0:
                (folder / _KEYS).unlink(missing_ok=True)
    return 0


def check_every(every: int | None, snapshots: object) -> None:
    """Raises `PolicyError` unless both are given, or neither, or only the folder to go on from."""
    if every is not None and (snapshots is None or every < 1):
        raise PolicyError(f"a snapshot every {every} updates, in {snapshots}: expected a number ≥ 1, and a folder")


def _own(addresses: Sequence[str], number: int) -> str:
    """The address to listen on: that which others were given, or a free port of the loopback."""
    return addresses[number] if addresses else "tcp://127.0.0.1:*"


def _keys_in(folder: Path, number: int) -> Keys:
    """The keys that server 0 puts into the folder."""
    if number == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _KEYS).unlink(missing_ok=True)
        keys = make_keys()
        save_keys(keys, folder / f".{_KEYS}.{os.getpid()}")
        (folder / f".{_KEYS}.{os.getpid()}").rename(folder / _KEYS)
        return keys
    deadline = time.monotonic() + _PATIENCE
    while not (folder / _KEYS).exists():
        if time.monotonic() > deadline:
            raise TransportUnavailable(f"server {number}: no keys in {folder} after {_PATIENCE:g} s: is server 0 up?")
        time.sleep(0.05)
    return load_keys(folder / _KEYS)


def _write(path: Path, card: dict[str, object]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(card))
    unfinished.rename(path)
