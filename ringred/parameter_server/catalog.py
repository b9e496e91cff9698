"""Which tensors the servers have, where their pieces lie, and which worker gives the values of a new one."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ringred.errors import PolicyError
from ringred.parameter_server import messages as m
from ringred.parameter_server.partition import Piece, Size, partition
from ringred.parameter_server.rules import Rule
from ringred.parameter_server.shard import Answer, dtype_of

__all__ = ["WHOLE", "Catalog", "Placing"]


_NOBODY = -2  # the creator of what the next one that declares it gives the value of


class Placing(NamedTuple):
    """How tensors lie on shards: for workers of `shares` ranks, in pieces of at most `longest` bytes (None: of any)."""

    shares: int = 1
    longest: int | None = None


WHOLE = Placing()


@dataclass
class _Tensor:
    """A declared tensor: `creator` is the worker that was told to give its value, -1 once it is there."""

    shape: list[int]
    dtype: str
    group: int
    digest: str
    numbers: list[int]
    creator: int


class Catalog:
    """A part of the coordinator, and like it a state machine: tensors are declared by all workers, and placed on
    `shards` shards as `placing` says, each of them for the ranks of a worker.

    Here and in `Placed`, a piece's `shard` counts both: shard number × `shares` + share.
    """

    def __init__(self, shards: int, placing: Placing = WHOLE) -> None:
        self.shards, self.shares, self._longest = shards, placing.shares, placing.longest
        self.tensors: dict[str, _Tensor] = {}
        self.pieces: list[Piece] = []
        self._loads = [0] * (shards * placing.shares)
        self.rule: Rule | None = None
        self._loaded = False
        self._waiting: deque[tuple[int, bytes, int, list[str]]] = deque()

    def declare(self, peer: bytes, request: int, message: m.Declare) -> list[Answer]:
        """Places what is new. Raises `PolicyError` for a tensor that is there and is another one."""
        told = json.loads(message.text)
        rule = Rule.from_json(told["rule"])
        if self.rule is not None and rule != self.rule and not (self._loaded and rule.fits(self.rule)):
            raise PolicyError(f"worker {message.worker}: expected the update rule {self.rule}, got {rule}")
        new = [entry for entry in told["tensors"] if entry[0] not in self.tensors]
        for name, shape, dtype, group, digest in told["tensors"]:
            known = self.tensors.get(name)
            if known is None:
                continue
            if (known.shape, known.dtype, known.group) != (shape, dtype, group):
                raise PolicyError(
                    f"worker {message.worker}: {name!r} is there: expected shape {tuple(known.shape)}, dtype "
                    f"{known.dtype}, group {known.group}; got {tuple(shape)}, {dtype}, {group}"
                )
            if digest and known.digest and digest != known.digest:
                raise PolicyError(f"worker {message.worker}: {name!r} is there already, with other values")
        self.rule = self.rule or rule
        self._place(message.worker, new, self.rule)
        names = [entry[0] for entry in told["tensors"]]
        for name in names:
            if self.tensors[name].creator == _NOBODY:
                self.tensors[name].creator = message.worker
        return self._placed([(message.worker, peer, request, names)])

    def created(self, peer: bytes, request: int, message: m.Created) -> list[Answer]:
        """The shards have the values that this worker was to give."""
        for tensor in self.tensors.values():
            if tensor.creator == message.worker:
                tensor.creator = -1
        return [Answer(peer, request, m.Done()), *self._ask_again()]

    def left(self, worker: int) -> list[Answer]:
        """Another that declared the same tensors gives the values that `worker` did not live to give."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != worker)
        orphans = {name for name, tensor in self.tensors.items() if tensor.creator == worker}
        for heir, _, _, names in self._waiting:
            for name in orphans.intersection(names):
                self.tensors[name].creator = heir
                orphans.discard(name)
        for name in orphans:
            self.tensors[name].creator = _NOBODY
        return self._ask_again()

    @property
    def layout(self) -> dict[str, list[tuple[int, int, int, int]]]:
        """The pieces of each tensor: number, start, stop, shard."""
        return {
            name: [(number, *self.pieces[number][1:3], self.pieces[number].shard // self.shares) for number in own]
            for name, own in ((name, tensor.numbers) for name, tensor in self.tensors.items())
        }

    def state(self) -> dict[str, Any]:
        """The rule, and the tensors whose values are there."""
        return {
            "rule": None if self.rule is None else self.rule.as_json(),
            "tensors": [
                [name, tensor.shape, tensor.dtype, tensor.group, tensor.numbers]
                for name, tensor in self.tensors.items()
                if tensor.creator == -1
            ],
        }

    def load_state(self, whole: Mapping[str, Any]) -> None:
        """Takes the rule of a whole state, and places those of its tensors that are not there."""
        rule = None if whole["rule"] is None else Rule.from_json(whole["rule"])
        if rule is not None and self.rule is not None and not self.rule.fits(rule):
            raise PolicyError(f"expected a state under the rule {self.rule}, got {rule}")
        new = [[*entry, ""] for entry in whole["tensors"] if entry[0] not in self.tensors]
        if rule is not None:
            self._place(-1, new, rule)
        self.rule, self._loaded = rule or self.rule, True

    def _place(self, creator: int, entries: list[Any], rule: Rule) -> None:
        sizes = []
        for _, shape, dtype, _, _ in entries:
            elements = 1
            for extent in shape:
                elements *= int(extent)
            sizes.append(Size(elements, dtype_of(dtype).itemsize, rule.cuttable))
        numbers: list[list[int]] = [[] for _ in entries]
        first = len(self.tensors)
        for piece in partition(sizes, self.shards * self.shares, self._loads, self._longest):
            numbers[piece.tensor].append(len(self.pieces))
            self.pieces.append(piece._replace(tensor=first + piece.tensor))
            self._loads[piece.shard] += (piece.stop - piece.start) * sizes[piece.tensor].itemsize
        for (name, shape, dtype, group, digest), own in zip(entries, numbers, strict=True):
            self.tensors[name] = _Tensor(shape, dtype, group, digest, own, creator)

    def _placed(self, asked: list[tuple[int, bytes, int, list[str]]]) -> list[Answer]:
        """Answers those whose tensors are there, or who are to give them; the others wait."""
        answers: list[Answer] = []
        for worker, peer, request, names in asked:
            creators = {self.tensors[name].creator for name in names} - {-1}
            if creators - {worker}:
                if (worker, peer, request, names) not in self._waiting:  # else it is asked again
                    self._waiting.append((worker, peer, request, names))
                continue
            numbers = [number for name in names for number in self.tensors[name].numbers]
            pieces = tuple(self.pieces[number] for number in numbers)
            answers.append(Answer(peer, request, m.Placed(int(bool(creators)), tuple(numbers), pieces)))
        return answers

    def _ask_again(self) -> list[Answer]:
        asked, self._waiting = list(self._waiting), deque()
        return self._placed(asked)
