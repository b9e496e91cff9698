"""Servers in processes of their own: `ringred serve`. They meet in a folder that all of them see (`meeting.py`), or at
addresses that everybody is told."""

from __future__ import annotations

import copy
import json
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ringred.errors import PolicyError
from ringred.parameter_server.catalog import Placing
from ringred.parameter_server.coordinator import Coordinator, StalenessAware
from ringred.parameter_server.keys import Keys
from ringred.parameter_server.meeting import card_in, find_servers, keys_in
from ringred.parameter_server.partition import SEALED_BYTES
from ringred.parameter_server.policies import Policy
from ringred.parameter_server.server import Server

__all__ = ["check_every", "serve"]

_RETURN = 60.0  # seconds in which workers that died may come back when none is left


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
    if folder is not None and keys is not None:
        raise PolicyError("serve: in a folder server 0 makes the keys; --keys goes with --addresses")
    if folder is not None:
        keys = keys_in(folder, number)
    elif keys is None:
        raise PolicyError("serve: at given addresses, --keys has to name a file of keys; ringred keys makes one")

    # The same of all servers, whatever each of them listens on.
    placing = Placing(ranks_per_host, SEALED_BYTES)

    def coordinator() -> Coordinator:
        aware = staleness_aware
        options: Any = {"updates": updates, "staleness_aware": aware, "snapshots": place, "every": every}
        options["placing"] = placing
        return Coordinator(copy.deepcopy(policy), workers, shards, **options)

    own = listen or _own(addresses, number)
    ways: Any = {"replicate": replicate, "snapshots": place, "placing": placing}
    server = Server(number, shards, coordinator, listen=own, keys=keys, **ways)
    ended = threading.Event()
    try:
        for which in (signal.SIGTERM, signal.SIGINT):
            signal.signal(which, lambda *_: ended.set())
        with nullcontext() if folder is None else card_in(folder, number, shards, server.address):
            server.start(addresses if folder is None else find_servers(folder)[0])
            told(f"ringred: server {number} of {shards} listens on {server.address}")
            while not ended.wait(0.1) and not server.done(_RETURN):
                pass
            if server.coordinator is not None:
                told(f"ringred: {json.dumps(server.coordinator.report())}")
    finally:
        server.close("was ended" if ended.is_set() else "")
    return 0


def check_every(every: int | None, snapshots: object) -> None:
    """Raises `PolicyError` unless both are given, or neither, or only the folder to go on from."""
    if every is not None and (snapshots is None or every < 1):
        raise PolicyError(f"a snapshot every {every} updates, in {snapshots}: expected a number ≥ 1, and a folder")


def _own(addresses: Sequence[str], number: int) -> str:
    """The address to listen on: that which others were given, or a free port of the loopback."""
    return addresses[number] if addresses else "tcp://127.0.0.1:*"
