"""The ranks of a host are one worker: each has its share of the pieces, and only that goes to and from the servers.

Gradients are reduce-scattered inside the host and pushed by their owners; values are pulled by their owners and
all-gathered. Between hosts each byte travels once a host instead of once a rank, as in hierarchical all-reduces.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ringred.communicator import Communicator
from ringred.errors import CollectiveTimeout, PolicyError
from ringred.parameter_server.agreeing import from_first, numbers, together
from ringred.parameter_server.flat import check_dense
from ringred.parameter_server.pulling import Piece, Pull, Target, Targets
from ringred.parameter_server.worker import Gradients, Worker

__all__ = ["ByHost"]

_BUCKET_BYTES = 4 << 20


class _Place(NamedTuple):
    """Piece `piece` of parameter `name`: `value` is its part of the owner's segment, `seen` tells whether any rank has
    a gradient."""

    name: str
    piece: Piece
    value: Tensor
    seen: Tensor


class _Bucket:
    """Parameters of one dtype that are exchanged together: a segment of memory for each owner."""

    def __init__(
        self, local: Communicator, parameters: Mapping[str, Tensor], pieces: Mapping[str, list[Piece]]
    ) -> None:
        self.names = list(parameters)
        self.missing = set(self.names)
        dtype = next(iter(parameters.values())).dtype
        of_owner: list[list[tuple[str, Piece]]] = [[] for _ in range(local.size)]
        for name in parameters:
            for piece in pieces[name]:
                of_owner[piece.owner].append((name, piece))
        self.segments = [
            torch.zeros(sum(piece.stop - piece.start + 1 for _, piece in owned), dtype=dtype) for owned in of_owner
        ]
        self.own = torch.zeros_like(self.segments[local.rank])
        self.places = [
            place for owned, segment in zip(of_owner, self.segments, strict=True) for place in _placed(owned, segment)
        ]
        self.of_name: dict[str, list[_Place]] = {name: [] for name in parameters}
        for place in self.places:
            self.of_name[place.name].append(place)
        self.owned = _placed(of_owner[local.rank], self.own)
        self.work: Any = None

    def put(self, name: str, gradient: Tensor | None) -> None:
        """Copies a gradient to the segments of its owners; None: there is none."""
        flat = None if gradient is None else gradient.detach().reshape(-1)
        for _, piece, value, seen in self.of_name[name]:
            if flat is None:
                value.zero_()
            else:
                value.copy_(flat[piece.start : piece.stop])
            seen.fill_(0 if flat is None else 1)
        self.missing.discard(name)

    def take(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies the values of the segments to their parameters."""
        flat = {name: parameters[name].detach() for name in self.names}
        for name, piece, value, _ in self.places:
            if flat[name].is_contiguous():
                flat[name].view(-1)[piece.start : piece.stop].copy_(value)
            else:
                whole = flat[name].reshape(-1)
                whole[piece.start : piece.stop].copy_(value)
                flat[name].copy_(whole.view(flat[name].shape))


def _placed(owned: list[tuple[str, Piece]], segment: Tensor) -> list[_Place]:
    """The values one after the other, and behind them a flag for each."""
    places, at, flag = [], 0, segment.numel() - len(owned)
    for number, (name, piece) in enumerate(owned):
        size = piece.stop - piece.start
        places.append(_Place(name, piece, segment[at : at + size], segment[flag + number : flag + number + 1]))
        at += size
    return places


class ByHost:
    """As `Flat`, together with the other ranks of `local`, whose rank 0 talks to the coordinator. Its methods are
    collective in it."""

    def __init__(self, worker: Worker, parameters: Mapping[str, nn.Parameter], local: Communicator) -> None:
        self._worker, self._parameters, self._local = worker, parameters, local
        self._data = local.duplicate()  # a rank may reduce its buckets while another one agrees to end the mini-batch
        self._buckets = self._made()
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.names}
        self._targets = [
            Targets.at(
                (place.piece.shard, Target(place.piece.number, place.value, worker.offset(place.piece)))
                for place in bucket.owned
            )
            for bucket in self._buckets
        ]
        self._launched = 0

    def _made(self) -> list[_Bucket]:
        """In the order in which backward is expected to make gradients."""
        groups: list[dict[str, Tensor]] = []
        nbytes: int = 0
        for name, parameter in reversed(list(self._parameters.items())):
            last = next(iter(groups[-1].values())) if groups else None
            if last is None or last.dtype != parameter.dtype or nbytes >= _BUCKET_BYTES:
                groups.append({})
                nbytes = 0
            groups[-1][name] = parameter
            nbytes += parameter.nbytes
        return [_Bucket(self._local, group, self._worker.pieces) for group in groups]

    # ------------------------------------------------------------------ values

    def pull(self, timeout: float | None) -> bool:
        """Waits until this host is released, and takes the newest parameters; whether they are not the last."""
        worker = self._worker
        if any(launched for (launched,) in numbers(self._local, [self._launched])):
            self._reduce_all()
        self._abandon()
        deadline = time.monotonic() + (worker.connection.timeout if timeout is None else timeout)
        version, over = from_first(self._local, lambda: (worker.begin(timeout), worker.releases.over), 2)
        if worker.releases.pulled < version:
            found = together(self._local, lambda: self._take(version, deadline))
            worker.at(min(of_rank for (of_rank,) in numbers(self._local, [found])))  # the same on all of them
        return not over

    def _take(self, version: int, deadline: float) -> int:
        """Each bucket is gathered as soon as this rank's share of it is there, the front layers' first."""
        worker, versions = self._worker, []
        pulls: list[tuple[_Bucket, Pull]] = [
            (bucket, worker.start(targets, version))
            for bucket, targets in zip(reversed(self._buckets), reversed(self._targets), strict=True)
        ]
        works = []
        for bucket, pull in pulls:
            left = deadline - time.monotonic()
            if left <= 0:
                raise CollectiveTimeout(f"worker {worker.number}: the values of version {version} did not come in time")
            versions.append(pull.finish(left))
            works.append(self._data.all_gather(bucket.segments, bucket.own, async_op=True))
        for (bucket, _), work in zip(pulls, works, strict=True):
            assert work is not None
            work.wait()
            with torch.no_grad():
                bucket.take(self._parameters)
        return min(versions)

    def arrive(self) -> None:
        """Values are there once `pull` returns."""

    # ------------------------------------------------------------------ gradients

    def ready(self, name: str, gradient: Tensor) -> None:
        """Backward has made this gradient; buckets are reduced in their order."""
        check_dense({name: gradient})
        bucket = self._bucket_of[name]
        if name not in bucket.missing:
            raise PolicyError(
                f"{name!r} has a second gradient in a mini-batch: the backwards before it go under no_sync"
            )
        bucket.put(name, gradient)
        self._launch()

    def _launch(self) -> None:
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            bucket = self._buckets[self._launched]
            bucket.work = self._data.reduce_scatter(bucket.own, bucket.segments, "avg", async_op=True)
            self._launched += 1

    def _reduce_all(self) -> None:
        """Ends what this rank, or another one of the host, has begun: what is missing counts as zeros."""
        for bucket in self._buckets[self._launched :]:
            for name in list(bucket.missing):
                bucket.put(name, self._parameters[name].grad)
        self._launch()
        for bucket in self._buckets:
            bucket.work.wait()

    def push(self) -> bool:
        """Ends the mini-batch; whether it was still wanted."""
        worker, local = self._worker, self._local
        cancelled = local.rank == 0 and worker.releases.cancelled
        told = numbers(local, [self._launched, cancelled])
        cancelled = bool(told[0][1])
        if not cancelled or any(launched for launched, _ in told):
            self._reduce_all()
        if not cancelled:
            gradients = worker.gradients()
            together(local, lambda: self._push_own(gradients))
            from_first(local, lambda: self._commit(gradients), 1)
        self._abandon()
        return not cancelled

    def _push_own(self, gradients: Gradients) -> None:
        by_shard: dict[int, list[tuple[Piece, Tensor]]] = {}
        for bucket in self._buckets:
            for _, piece, value, seen in bucket.owned:
                if seen > 0:
                    by_shard.setdefault(piece.shard, []).append((piece, value))
        self._worker.push_pieces(gradients, by_shard)
        self._worker.wait_held(gradients)

    def _commit(self, gradients: Gradients) -> list[int]:
        self._worker.commit(gradients)
        return [gradients.version]

    @property
    def cancelled(self) -> bool:
        """Whether the mini-batch in progress is not wanted any more; collective in the host."""
        return bool(from_first(self._local, lambda: [self._worker.releases.cancelled], 1)[0])

    def _abandon(self) -> None:
        self._launched = 0
        for bucket in self._buckets:
            bucket.work = None
            bucket.missing = set(bucket.names)

    def close(self) -> None:
        """The host's communicators end."""
        self._data.close()
        self._local.close()
