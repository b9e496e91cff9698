"""Values on their way from servers to a worker's tensors: read where the server keeps them, or asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringred.errors import CollectiveTimeout
from ringred.parameter_server import messages as m
from ringred.parameter_server.connection import Connection, Request
from ringred.parameter_server.shard import as_tensor

__all__ = ["Piece", "Pull", "Target", "Targets"]


class Piece(NamedTuple):
    """A part of a tensor: elements `start` to `stop`, which are piece `number`, on shard `shard`. In each host, rank
    `owner` pushes and pulls it, if the host's ranks are one worker."""

    number: int
    start: int
    stop: int
    shard: int
    owner: int = 0


class Target(NamedTuple):
    """Where piece `number` is to go: `part`, 1-D; and where in its server's window it is, if that is shared."""

    number: int
    part: Tensor
    offset: int | None


class Targets(NamedTuple):
    """Where values go, by shard. `copies` are the tensors that are not contiguous, with their contiguous copies."""

    by_shard: dict[int, list[Target]]
    copies: list[tuple[Tensor, Tensor]]
    nbytes: int

    @classmethod
    def at(cls, targets: Iterable[tuple[int, Target]]) -> Targets:
        """Targets, with their shards."""
        by_shard: dict[int, list[Target]] = {}
        for shard, target in targets:
            by_shard.setdefault(shard, []).append(target)
        return cls(by_shard, [], sum(target.part.nbytes for parts in by_shard.values() for target in parts))

    @classmethod
    def of(
        cls, out: Mapping[str, Tensor], pieces: Mapping[str, Sequence[Piece]], offsets: Mapping[int, int]
    ) -> Targets:
        """The tensors of `out`, in its order."""
        targets: list[tuple[int, Target]] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for name, tensor in out.items():
            flat = tensor.detach()
            if not flat.is_contiguous():
                copies.append((flat, torch.empty_like(flat, memory_format=torch.contiguous_format)))
                flat = copies[-1][1]
            flat = flat.view(-1)
            for piece in pieces[name]:
                part = flat[piece.start : piece.stop]
                targets.append((piece.shard, Target(piece.number, part, offsets.get(piece.number))))
        return cls.at(targets)._replace(copies=copies)


class Pull:
    """A pull of values of `version` or newer to `targets`, which has begun: `finish` ends it."""

    def __init__(self, connection: Connection, targets: Targets, version: int) -> None:
        self._connection, self._targets, self._least = connection, targets, version
        self._asked: list[tuple[list[Target], Request]] = []
        for shard, parts in targets.by_shard.items():
            if shard not in connection.values:
                self._ask_for(shard, parts)

    def _ask_for(self, shard: int, parts: list[Target]) -> None:
        numbers = tuple(target.number for target in parts)
        nbytes = sum(target.part.nbytes for target in parts)
        self._asked.append((parts, self._connection.ask(1 + shard, m.Pull(self._least, numbers), answer_bytes=nbytes)))

    @torch.no_grad()
    def finish(self, timeout: float) -> int:
        """Waits until the values are there, and returns the oldest version among them. Raises `CollectiveTimeout`."""
        deadline = time.monotonic() + timeout
        versions: list[int] = []
        by_message = {id(parts) for parts, _ in self._asked}
        for shard, parts in self._targets.by_shard.items():
            if id(parts) not in by_message:
                late = self._read(shard, parts, deadline, versions)
                if late:
                    self._ask_for(shard, late)
        for parts, request in self._asked:
            (values,) = self._connection.wait([request], timeout)
            versions.append(values.version)
            for target, frame in zip(parts, request.frames, strict=True):
                target.part.copy_(as_tensor(frame, target.part.dtype))
        for tensor, copy in self._targets.copies:
            tensor.copy_(copy)
        return min(versions, default=self._least)

    def _read(self, shard: int, parts: list[Target], deadline: float, versions: list[int]) -> list[Target]:
        """Reads where the server keeps them; returns the pieces for which that did not succeed."""
        connection = self._connection
        values: Any = connection.values.get(shard)

        def gone() -> bool:
            connection.poll(0.0, connection.server_of(1 + shard))
            return shard not in connection.values

        if values is None or not values.wait(self._least, deadline, gone):
            if shard not in connection.values:  # its server died: its copy is asked
                return parts
            raise CollectiveTimeout(
                f"worker {connection.worker}: shard {shard} did not reach version {self._least}, it is at "
                f"{values.version}"
            )
        late = []
        for target in parts:
            assert target.offset is not None
            found = values.read(self._least, target.offset, target.part)
            if found is None:
                late.append(target)
            else:
                versions.append(found)
        return late
