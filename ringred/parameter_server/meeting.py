"""A folder where servers in processes of their own meet, and where workers find them.

Each server leaves a card with its address, and server 0 the job's keys. A server holds a lock on its card while it
lives, so that what a killed job left in the folder is not taken for a new one's.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ringred.errors import CollectiveTimeout, TransportUnavailable
from ringred.parameter_server.keys import Keys, load_keys, make_keys, save_keys
from ringred.parameter_server.shared import place

__all__ = ["card_in", "find_servers", "keys_in"]

_KEYS = "keys.json"
_PATIENCE = 60.0  # seconds to wait for the other servers
_SLICE = 0.05


def find_servers(folder: str | Path, timeout: float = _PATIENCE) -> tuple[list[str], Keys]:
    """The addresses of the servers that meet in `folder`, and their keys. Waits until all are there; raises
    `CollectiveTimeout` after `timeout` seconds."""
    folder, deadline = Path(folder), time.monotonic() + timeout
    while True:
        found = [card for path in sorted(folder.glob("server-*.json")) if (card := _read(path)) is not None]
        expected = found[0]["shards"] if found else 0
        addresses = {card["number"]: card["address"] for card in found if card["shards"] == expected}
        if found and len(addresses) == expected and (folder / _KEYS).exists():
            return [addresses[number] for number in range(expected)], load_keys(folder / _KEYS)
        if time.monotonic() > deadline:
            missing = sorted(set(range(expected)) - addresses.keys()) if found else "all"
            raise CollectiveTimeout(
                f"no servers in {folder} after {timeout:g} s: missing {missing}; is ringred serve up?"
            )
        time.sleep(_SLICE)


def keys_in(folder: Path, number: int) -> Keys:
    """The keys that server 0 puts into the folder. Raises `TransportUnavailable` if it does not."""
    if number == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _card(folder, 0).unlink(missing_ok=True)  # first: who sees a card of server 0 takes the keys beside it
        keys = make_keys()
        unfinished = _unfinished(folder / _KEYS)
        save_keys(keys, unfinished)
        unfinished.rename(folder / _KEYS)
        return keys
    deadline = time.monotonic() + _PATIENCE
    while _read(_card(folder, 0)) is None:
        if time.monotonic() > deadline:
            raise TransportUnavailable(f"server {number}: no server 0 in {folder} after {_PATIENCE:g} s: is it up?")
        time.sleep(_SLICE)
    return load_keys(folder / _KEYS)


@contextmanager
def card_in(folder: Path, number: int, shards: int, address: str) -> Iterator[None]:
    """Within it the card of server `number` lies in the folder."""
    path, unfinished = _card(folder, number), _unfinished(_card(folder, number))
    with unfinished.open("w") as file:
        card = {"number": number, "shards": shards, "address": address, "place": place()}
        if card["place"]:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # a file system without locks
                card["place"] = ""
        file.write(json.dumps(card))
        file.flush()
        unfinished.rename(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if number == 0:
                (folder / _KEYS).unlink(missing_ok=True)


def _card(folder: Path, number: int) -> Path:
    return folder / f"server-{number}.json"


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _read(path: Path) -> dict[str, Any] | None:
    """The card; None if there is none, or if its server was of this place and is gone."""
    try:
        with path.open() as file:
            card: dict[str, Any] = json.load(file)
            if not card["place"] or card["place"] != place():
                return card
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return card
    return None
