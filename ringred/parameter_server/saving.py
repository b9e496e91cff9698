"""Snapshots that are being made: every shard writes what it has at one version, and the coordinator's part ends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ringred.parameter_server import messages as m
from ringred.parameter_server.shard import PASSED, Answer, Result, Writing

__all__ = ["Order", "Saving"]


class Order(NamedTuple):
    """`message` for shard `shard`, its `number`-th."""

    shard: int
    number: int
    message: Any


@dataclass
class _Snapshot:
    """One that is being made: the coordinator's own state, the orders that are open, and who asked for it."""

    version: int
    folder: str
    name: str
    text: str
    open: set[tuple[int, int]]
    asked: list[tuple[bytes, int]]


class Saving:
    """A part of the coordinator, and like it a state machine. `order(message)` gives an order to all shards, and
    `state()` is what the coordinator itself has."""

    def __init__(self, order: Callable[[Any], list[Order]], state: Callable[[], dict[str, Any]]) -> None:
        self._order, self._state = order, state
        self._being_made: list[_Snapshot] = []
        self.newest, self.failure = -1, ""

    def __bool__(self) -> bool:
        """Whether one is being made."""
        return bool(self._being_made)

    def begin(self, folder: str, token: str, asked: list[tuple[bytes, int]]) -> list[Result | Order]:
        """A snapshot of now, in `folder`. Its name is unlike that of any other with another `token`."""
        if asked and any(asked == other.asked for other in self._being_made):  # asked again
            return []
        told = self._state()
        name = f"update-{told['version']:012d}-{token}"
        orders = self._order(m.Write(told["version"], folder, name))
        waited = {(order.shard, order.number) for order in orders}
        self._being_made.append(_Snapshot(told["version"], folder, name, json.dumps(told), waited, asked))
        return [*orders]

    def answered(self, shard: int, number: int, failure: str) -> list[Result | Order]:
        """A shard has written its part, or could not."""
        found = next((snapshot for snapshot in self._being_made if (shard, number) in snapshot.open), None)
        if found is None:
            return []
        found.open.discard((shard, number))
        if failure:
            self._being_made.remove(found)
            if failure == PASSED:
                return [Answer(peer, request, m.Saved(-1)) for peer, request in found.asked]
            return self._ended(found, f"shard {shard}: {failure}")
        return [] if found.open else [Writing(found.folder, found.name, -1, found.text, (), b"", 0)]

    def written(self, name: str, failure: str) -> list[Result | Order]:
        """The coordinator's part, the last one, is on disk, or could not be written."""
        found = next((snapshot for snapshot in self._being_made if snapshot.name == name), None)
        if found is None:
            return []
        self._being_made.remove(found)
        return self._ended(found, failure)

    def _ended(self, snapshot: _Snapshot, failure: str) -> list[Result | Order]:
        answer: Any = m.Saved(snapshot.version)
        if failure:
            self.failure = f"version {snapshot.version}: {failure}"
            answer = m.Failed("PolicyError", f"there is no snapshot of {self.failure}")
        else:
            self.newest = max(self.newest, snapshot.version)
        return [Answer(peer, request, answer) for peer, request in snapshot.asked]

    def forget_before(self, numbers: Sequence[int]) -> None:
        """The orders before these, by shard, are answered; a snapshot of which all are is not this machine's to end."""
        for snapshot in self._being_made:
            snapshot.open = {(shard, number) for shard, number in snapshot.open if number >= numbers[shard]}
        self._being_made = [snapshot for snapshot in self._being_made if snapshot.open]
