"""A worker's side of the protocol: tensors are declared, gradients pushed in pieces and committed, values pulled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ringred.errors import CollectiveTimeout, PolicyError, RingredError, UnsupportedTensor
from ringred.parameter_server import messages as m
from ringred.parameter_server.connection import Connection, Request
from ringred.parameter_server.encoding import RAW, Encoding
from ringred.parameter_server.keys import Keys
from ringred.parameter_server.pulling import Piece, Pull, Targets
from ringred.parameter_server.releases import Releases
from ringred.parameter_server.rules import Rule
from ringred.parameter_server.shard import bytes_of
from ringred.parameter_server.whole import cut, joined, of_coordinator

__all__ = ["Gradients", "Worker"]


_TRIES = 5


class _Slot:
    """Memory in this worker's window for gradients of one piece; free once the shard is done with `sequence`."""

    def __init__(self, memory: Tensor, offset: int) -> None:
        self.memory, self.offset, self.sequence = memory, offset, -1


class Gradients:
    """The worker's `sequence`-th gradient while it is pushed: the parts that are on their way."""

    def __init__(self, sequence: int, version: int) -> None:
        self.sequence, self.version = sequence, version
        self.parts: list[Request] = []


class Worker:
    """Worker `number` at the servers at `addresses`. Constructing it waits, up to `timeout` seconds, until all workers
    are there.

    `releases` tell when it may go on, and whether the mini-batch that it computes is not wanted any more.
    """

    def __init__(
        self,
        number: int,
        addresses: Sequence[str],
        *,
        keys: Keys | None = None,
        timeout: float = 60.0,
        shared: bool = True,
        encoding: Encoding | None = None,
        told: str | None = None,
    ) -> None:
        self.number, self.encoding = number, encoding or Encoding()
        self.shards = len(addresses)
        self.version = 0  # of the oldest piece that was pulled last
        self._versions: dict[int, int] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self._offsets: dict[int, int] = {}
        self._slots: dict[int, list[_Slot]] = {}
        self.bytes_pushed = self.bytes_pulled = 0
        options: Any = {"keys": keys, "timeout": timeout, "shared": shared}
        self.connection = Connection(addresses, number, lambda message: self.releases.told(message), **options)
        self.releases = Releases(number, self.connection)
        self._end: Request | None = None
        if told is None:
            told = self._welcomed()
        else:
            self._end = self.connection.ask(m.COORDINATOR, m.Attend(number, self.connection.life))
        self.told = told
        """What a rank of the same host that is not the first one is given, to push and pull as the same worker."""
        welcome = json.loads(told)
        self.policy, self.workers, self.shares = welcome["policy"], welcome["workers"], welcome["shares"]
        self.sequence, self.life = welcome["sequence"], welcome["life"]

    def _welcomed(self) -> str:
        try:
            hello = self.connection.ask(m.COORDINATOR, m.Hello(self.number, self.connection.life))
            (welcome,) = self.connection.wait([hello])
        except CollectiveTimeout as failure:
            self.connection.close()
            raise CollectiveTimeout(f"{failure}: are all workers there?") from None
        except BaseException:
            self.connection.close()
            raise
        return json.dumps({**json.loads(welcome.text), "life": self.connection.life})

    # ------------------------------------------------------------------ tensors

    def declare(
        self, tensors: Mapping[str, Tensor], rule: Rule, groups: Sequence[int], *, check_values: bool = False
    ) -> None:
        """The servers have `tensors` from here on, updated by `rule` in its `groups`. The first worker's values are
        taken; if `check_values`, those of the others must be the same."""
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise UnsupportedTensor(
                    f"worker {self.number}: {name!r}: expected a floating-point dtype, got {tensor.dtype}"
                )
        entries = [
            [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), group, _digest(tensor, check_values)]
            for (name, tensor), group in zip(tensors.items(), groups, strict=True)
        ]
        text = json.dumps({"rule": rule.as_json(), "tensors": entries})
        asked = self.connection.ask(m.COORDINATOR, m.Declare(self.number, text))
        (placed,) = self.connection.wait([asked])
        names = list(tensors)
        order = {tensor: at for at, tensor in enumerate(dict.fromkeys(piece.tensor for piece in placed.pieces))}
        for name in names:
            self.pieces[name] = []
        for number, piece in zip(placed.numbers, placed.pieces, strict=True):
            shard, owner = divmod(piece.shard, self.shares)
            self.pieces[names[order[piece.tensor]]].append(Piece(number, piece.start, piece.stop, shard, owner))
        if placed.create:
            self._create(tensors, rule, dict(zip(names, groups, strict=True)))
        self._locate([piece for name in names for piece in self.pieces[name]])

    def _create(self, tensors: Mapping[str, Tensor], rule: Rule, groups: Mapping[str, int]) -> None:
        asked = []
        for shard in range(self.shards):
            entries, frames = [], []
            for name, tensor in tensors.items():
                flat = tensor.detach().reshape(-1)
                for piece in self.pieces[name]:
                    if piece.shard == shard:
                        part = flat[piece.start : piece.stop]
                        shape = list(tensor.shape if part.numel() == flat.numel() else part.shape)
                        dtype = str(tensor.dtype).removeprefix("torch.")
                        entries.append([piece.number, shape, dtype, groups[name]])
                        frames.append(part)
            if entries:
                text = json.dumps({"rule": rule.as_json(), "pieces": entries})
                asked.append(self.connection.ask(1 + shard, m.Create(text), frames))
        self.connection.wait(asked)
        self.connection.wait([self.connection.ask(m.COORDINATOR, m.Created(self.number))])

    def _locate(self, pieces: Sequence[Piece]) -> None:
        """Asks where the pieces lie in the windows of the servers that share theirs."""
        asked = []
        for shard in self.connection.values:
            numbers = tuple(piece.number for piece in pieces if piece.shard == shard)
            asked.append((numbers, self.connection.ask(1 + shard, m.Where(numbers))))
        for numbers, request in asked:
            (there,) = self.connection.wait([request])
            self._offsets.update(zip(numbers, there.offsets, strict=True))

    # ------------------------------------------------------------------ gradients

    def begin(self, timeout: float | None = None) -> int:
        """Waits until this worker is released, and returns the version that it must pull at least."""
        return self.releases.begin(self.connection.timeout if timeout is None else timeout, self.policy)

    def gradients(self) -> Gradients:
        """Starts the next gradient, at the version of the last pull."""
        self.sequence += 1
        return Gradients(self.sequence, self.version)

    def push(self, into: Gradients, given: Mapping[str, Tensor]) -> None:
        """Pushes gradients, by the names of their tensors, as part of `into`. They must not change before `commit`."""
        by_shard: dict[int, list[tuple[Piece, Tensor]]] = {}
        for name, gradient in given.items():
            self._check_known(name)
            flat = gradient.detach().reshape(-1)
            self._check_size(name, flat)
            for piece in self.pieces[name]:
                by_shard.setdefault(piece.shard, []).append((piece, flat[piece.start : piece.stop]))
        self.push_pieces(into, by_shard)

    def push_pieces(self, into: Gradients, by_shard: Mapping[int, Sequence[tuple[Piece, Tensor]]]) -> None:
        """As `push`, of single pieces."""
        for shard, parts in by_shard.items():
            into.parts.append(self._push_to(shard, into.sequence, parts))

    def _check_known(self, name: str) -> None:
        if name not in self.pieces:
            raise PolicyError(f"worker {self.number}: there is no tensor {name!r}; there are {_some(self.pieces)}")

    def _check_size(self, name: str, tensor: Tensor) -> None:
        pieces = self.pieces[name]
        if pieces and tensor.numel() != pieces[-1].stop:
            raise UnsupportedTensor(
                f"worker {self.number}: {name!r}: expected {pieces[-1].stop} elements, got {tensor.numel()}"
            )

    def _push_to(self, shard: int, sequence: int, parts: Sequence[tuple[Piece, Tensor]]) -> Request:
        numbers = tuple(piece.number for piece, _ in parts)
        code = self.encoding.code
        life = self.life
        if code == RAW and shard in self.connection.values:
            offsets = tuple(self._put(shard, sequence, piece.number, part) for piece, part in parts)
            return self.connection.ask(1 + shard, m.Part(self.number, life, sequence, code, numbers, offsets))
        frames = [self.encoding.encoded(piece.number, part) for piece, part in parts]
        self.bytes_pushed += sum(frame.nbytes for frame in frames)
        return self.connection.ask(1 + shard, m.Part(self.number, life, sequence, code, numbers, ()), frames)

    def _put(self, shard: int, sequence: int, number: int, part: Tensor) -> int:
        """Copies `part` to memory that the shard reads, and returns where that is."""
        area = self.connection.area
        assert area is not None
        slots = self._slots.setdefault(number, [])
        done = self.connection.values[shard].finished(self.number)
        slot = next((slot for slot in slots if slot.sequence <= done), None)
        if slot is None:
            memory = area.heap.empty(part.numel(), part.dtype)
            slot = _Slot(memory, area.offset(memory) if memory.numel() else 0)
            slots.append(slot)
        slot.memory.copy_(part)
        slot.sequence = sequence
        self.bytes_pushed += part.nbytes
        return slot.offset

    def wait_held(self, gradients: Gradients) -> None:
        """Waits until all shards hold what was pushed."""
        self.connection.wait(gradients.parts)

    def offset(self, piece: Piece) -> int | None:
        """Where a piece lies in its server's window, if that is shared."""
        return self._offsets.get(piece.number)

    def commit(self, gradients: Gradients, version: int | None = None) -> None:
        """Waits until all shards hold all parts; then the gradient counts, whatever happens to this worker."""
        # A part without frames for shard 0, where the coordinator is, goes the way of the commit, and comes before it.
        self.connection.wait([part for part in gradients.parts if part.machine != 1 or not part.near])
        at = gradients.version if version is None else version
        commit = m.Commit(self.number, self.life, gradients.sequence, at)
        self.connection.wait([*gradients.parts, self.connection.ask_after(gradients.parts, m.COORDINATOR, commit)])

    # ------------------------------------------------------------------ values

    def targets(self, out: Mapping[str, Tensor]) -> Targets:
        """Prepares to pull to the tensors of `out`, in its order."""
        for name, tensor in out.items():
            self._check_known(name)
            self._check_size(name, tensor)
        return Targets.of(out, self.pieces, self._offsets)

    def start(self, targets: Targets, version: int) -> Pull:
        """Begins to copy values of `version` or newer to the targets."""
        self.bytes_pulled += targets.nbytes
        return Pull(self.connection, targets, version)

    def pull(self, targets: Targets, version: int, timeout: float | None = None) -> int:
        """Copies values of `version` or newer to the targets, and returns the oldest version among them."""
        return self.start(targets, version).finish(self.connection.timeout if timeout is None else timeout)

    def at(self, version: int) -> None:
        """From here on, gradients are computed at values of `version`."""
        self.version = self.releases.pulled = version

    # ------------------------------------------------------------------ all that the servers have

    def collect(self) -> dict[str, Any]:
        """All that the servers have, at one version: see `whole`."""
        for _ in range(_TRIES):
            shards = [self.connection.expect(1 + shard, m.Pull(0, ())) for shard in range(self.shards)]
            collect = m.Collect(tuple(request.number for request in shards))
            own, *states = self.connection.wait([self.connection.ask(m.COORDINATOR, collect), *shards])
            told = json.loads(own.text)
            if all(isinstance(state, m.State) for state in states):  # else it did not come, and was asked for in vain
                given = [json.loads(state.text) for state in states]
                if all(state["version"] == told["version"] for state in given):
                    return joined(told, [(state, shard.frames) for state, shard in zip(given, shards, strict=True)])
        raise PolicyError(f"worker {self.number}: in {_TRIES} tries servers died, or were not at one version")

    def give(self, whole: Mapping[str, Any]) -> None:
        """The servers go on from a state that `collect` returned. Every worker gives it, before its first pull."""
        layout = {name: [piece[:4] for piece in pieces] for name, pieces in self.pieces.items()}
        parts = [cut(whole, layout, shard) for shard in range(self.shards)]
        head = json.dumps(of_coordinator(whole))
        self.connection.wait([self.connection.ask(m.COORDINATOR, m.State(head))])
        self.connection.wait(
            [
                self.connection.ask(1 + shard, m.State(json.dumps(told)), tensors)
                for shard, (told, tensors) in enumerate(parts)
            ]
        )

    def save(self, folder: str) -> int:
        """Has the servers write a snapshot, and returns its version."""
        for _ in range(_TRIES):
            (saved,) = self.connection.wait([self.connection.ask(m.COORDINATOR, m.Save(folder))])
            if saved.version >= 0:
                return int(saved.version)
        raise PolicyError(f"worker {self.number}: no snapshot in {_TRIES} tries: servers died meanwhile")

    # ------------------------------------------------------------------ the rest

    def report(self) -> dict[str, Any]:
        """The coordinator's figures."""
        (told,) = self.connection.wait([self.connection.ask(m.COORDINATOR, m.Report())])
        found: dict[str, Any] = json.loads(told.text)
        return found

    def scale_rate(self, rate: float) -> None:
        """From the next update on, learning rates are those of the rule times `rate`."""
        self.connection.wait([self.connection.ask(m.COORDINATOR, m.Scale(float(rate)))])

    def close(self, patience: float = 5.0, *, last: bool = False, because: str = "") -> None:
        """Says goodbye, `because` of an exception or because it is done; with `last`, waits until all workers have said
        it. What was committed counts."""
        bye = m.Bye(self.number, self.connection.life, int(last and self._end is None), because)
        with contextlib.suppress(RingredError):
            asked = [self.connection.ask(m.COORDINATOR, bye), *([self._end] if self._end is not None and last else [])]
            self.connection.wait(asked, math.inf if last else patience)
        self.connection.close()


def _digest(tensor: Tensor, wanted: bool) -> str:
    if not wanted:
        return ""
    return hashlib.blake2b(bytes_of(tensor), digest_size=16).hexdigest()


def _some(names: Mapping[str, Any]) -> str:
    listed = [repr(name) for name in names][:5]
    return f"{', '.join(listed)}{', ...' if len(names) > 5 else ''}" if listed else "none"
