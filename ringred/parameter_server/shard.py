"""One shard: its pieces of the tensors, their version, and the gradients that are held until the coordinator decides.

A state machine: it is given messages, and answers with messages. It has no socket and no clock, so that a second shard
that is given the same messages in the same order has the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ringred.errors import PolicyError, RingredError
from ringred.parameter_server import messages as m
from ringred.parameter_server.encoding import decoded
from ringred.parameter_server.policies import Gradient
from ringred.parameter_server.rules import Rule, Stepper
from ringred.runtime.folds import Folder, ReduceOp

__all__ = ["PASSED", "Answer", "Frame", "Memory", "Result", "Shard", "Writing", "as_tensor", "bytes_of", "dtype_of"]

Frame = Tensor | memoryview | bytes
PASSED = "it is at a later version"
"""Why a shard could not write what it had."""


class Answer(NamedTuple):
    """`message`, with `frames` of tensors, for whoever sent the request with the number `request` from `peer`."""

    peer: bytes
    request: int
    message: Any
    frames: Sequence[Frame] = ()


class Writing(NamedTuple):
    """The state of shard `number`, or with -1 of the coordinator, for a snapshot in `folder`; once it is on disk,
    `peer` is told so."""

    folder: str
    snapshot: str
    number: int
    text: str
    tensors: Sequence[Tensor]
    peer: bytes
    request: int


Result = Answer | Writing


class Memory:
    """Where a shard's values lie. This one is private; `shared.SharedMemory` is mapped by the workers of the host."""

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor."""
        return torch.empty(elements, dtype=dtype)

    def changing(self, version: int) -> None:
        """From here on the values are neither those of `version` nor those of the next."""

    def changed(self, version: int) -> None:
        """The values are those of `version`."""

    def offset(self, value: Tensor) -> int:
        """Where a tensor of `empty` lies for those who share this memory; -1 if nobody does."""
        return -1

    def finished(self, worker: int, sequence: int) -> None:
        """The gradients of `worker` up to `sequence` are not looked at any more."""


class _Held(NamedTuple):
    """The parts of one gradient, and the requests that they came with, by piece. What another life of the worker pushed
    under the same number is not among them."""

    life: int
    parts: dict[int, Tensor]
    requests: dict[int, int]


class _Waiting(NamedTuple):
    version: int
    pieces: tuple[int, ...]
    peer: bytes
    request: int


class Shard:
    """Handles the messages for shard `number`, whose values lie in `memory`.

    `window(peer, offset, nbytes, dtype)` gives memory of the peer that it shares with this process.
    """

    def __init__(
        self, number: int, memory: Memory, window: Callable[[bytes, int, int, torch.dtype], Tensor] | None = None
    ) -> None:
        self.number, self.memory, self.window = number, memory, window
        self.version = 0
        self.values: dict[int, Tensor] = {}
        self._groups: dict[int, int] = {}
        self._shapes: dict[int, list[int]] = {}
        self._rule: Rule | None = None
        self._stepper: Stepper | None = None
        self._held: dict[tuple[int, int], _Held] = {}
        self._done: dict[int, int] = {}
        self._waiting: list[_Waiting] = []
        self._folders: dict[tuple[torch.dtype, int], Folder] = {}
        self._loaded = -1  # the version of a state that was given
        self._copies: dict[int, Tensor] = {}  # of the values at this version, which messages in flight refer to
        self.bytes_in = self.bytes_out = 0

    def handle(self, peer: bytes, request: int, message: Any, frames: Sequence[Frame]) -> list[Result]:
        """What `message` leads to. A wrong message is answered by `Failed` and changes nothing."""
        try:
            answers: list[Result] = self._HANDLERS[type(message)](self, peer, request, message, frames)
        except Exception as failure:  # whatever a stranger may say, this one goes on
            kind = type(failure).__name__ if isinstance(failure, RingredError) else "PolicyError"
            text = f"shard {self.number}: {type(message).__name__}: {failure}"
            return [Answer(peer, request, m.Failed(kind, text))]
        return answers

    # ------------------------------------------------------------------ values

    def _create(self, peer: bytes, request: int, message: m.Create, frames: Sequence[Frame]) -> list[Result]:
        """A repeated request finds the pieces there, and changes nothing."""
        told = json.loads(message.text)
        rule = Rule.from_json(told["rule"])
        if self._rule is None:
            self._rule, self._stepper = rule, rule.stepper()
        elif rule != self._rule and not (self._loaded >= 0 and rule.fits(self._rule)):
            raise ValueError(f"expected the update rule {self._rule}, got {rule}")
        if len(frames) != len(told["pieces"]):
            raise ValueError(f"expected {len(told['pieces'])} frames of values, got {len(frames)}")
        for (number, shape, dtype, group), frame in zip(told["pieces"], frames, strict=True):
            if number in self.values:
                continue
            kind = dtype_of(dtype)
            given = as_tensor(frame, kind)
            elements = torch.Size(shape).numel()
            if given.numel() != elements:
                raise ValueError(f"piece {number}: expected {elements} elements of {kind}, got {given.numel()}")
            if not 0 <= group < len(rule.groups):
                raise ValueError(f"piece {number}: there is no group {group}")
            self._keep(number, shape, group, given)
        return [Answer(peer, request, m.Created(-1))]

    def _keep(self, number: int, shape: list[int], group: int, given: Tensor) -> None:
        value = self.memory.empty(given.numel(), given.dtype)
        value.copy_(given)
        assert self._stepper is not None
        self._stepper.add(value.view(shape), group)
        self.values[number], self._groups[number], self._shapes[number] = value, group, list(shape)

    def _pull(self, peer: bytes, request: int, message: m.Pull, frames: Sequence[Frame]) -> list[Result]:
        self._check_known(message.pieces)
        if message.version > self.version:
            waiting = _Waiting(message.version, message.pieces, peer, request)
            if waiting not in self._waiting:  # else it is asked again
                self._waiting.append(waiting)
            return []
        return [self._values(peer, request, message.pieces)]

    def _values(self, peer: bytes, request: int, pieces: Sequence[int]) -> Answer:
        """The frames are copies: the next update must not change what is still being sent."""
        for piece in pieces:
            if piece not in self._copies:
                self._copies[piece] = self.values[piece].clone()
            self.bytes_out += self.values[piece].nbytes
        return Answer(peer, request, m.Values(self.version), [self._copies[piece] for piece in pieces])

    def _where(self, peer: bytes, request: int, message: m.Where, frames: Sequence[Frame]) -> list[Result]:
        self._check_known(message.pieces)
        offsets = tuple(self.memory.offset(self.values[piece]) for piece in message.pieces)
        return [Answer(peer, request, m.There(offsets))]

    def _check_known(self, pieces: Sequence[int]) -> None:
        for piece in pieces:
            if piece not in self.values:
                raise ValueError(f"piece {piece} is not there; it has {len(self.values)} pieces")

    # ------------------------------------------------------------------ gradients

    def _part(self, peer: bytes, request: int, message: m.Part, frames: Sequence[Frame]) -> list[Result]:
        """Holds the part. One that is repeated, or comes after its gradient was used, is only acknowledged."""
        self._check_known(message.pieces)
        if message.sequence > self._done.get(message.worker, -1):
            parts = self._given(peer, message, frames)
            key = message.worker, message.sequence
            if key not in self._held or self._held[key].life != message.life:
                self._held[key] = _Held(message.life, {}, {})
            held = self._held[key]
            for piece, part in parts.items():
                if request > held.requests.get(piece, -1):  # else it is said again, maybe from memory that has changed
                    held.parts[piece], held.requests[piece] = part, request
            self.bytes_in += sum(part.nbytes for part in parts.values())
        return [Answer(peer, request, m.Held(message.sequence))]

    def _given(self, peer: bytes, message: m.Part, frames: Sequence[Frame]) -> dict[int, Tensor]:
        """The gradients of a part, by piece: where the worker put them, or decoded from its frames."""
        values = [self.values[piece] for piece in message.pieces]
        if message.offsets:
            if self.window is None or len(message.offsets) != len(values):
                raise ValueError(f"{len(message.offsets)} places for {len(values)} pieces, or no window of this worker")
            given = [
                self.window(peer, offset, value.nbytes, value.dtype)
                for offset, value in zip(message.offsets, values, strict=True)
            ]
        else:
            if len(frames) != len(values):
                raise ValueError(f"{len(frames)} frames for {len(values)} pieces")
            given = [
                decoded(message.encoding, frame, value.numel(), value.dtype)
                for frame, value in zip(frames, values, strict=True)
            ]
        return dict(zip(message.pieces, given, strict=True))

    def _apply(self, peer: bytes, request: int, message: m.Apply, frames: Sequence[Frame]) -> list[Result]:
        if message.version > self.version + 1:
            return []  # one before it was lost: both are given again
        if message.version > self.version:
            self._update(message)
            self._forget((*message.gradients, *message.dropped))
        return [Answer(peer, request, m.Applied(self.version)), *self._released()]

    def _update(self, message: m.Apply) -> None:
        nothing = _Held(0, {}, {})
        keys = [(gradient.worker, gradient.sequence) for gradient in message.gradients]
        parts = [self._held.get(key, nothing).parts for key in keys]
        folded = []
        for piece, value in self.values.items():
            given = [
                (part[piece], weight) for part, weight in zip(parts, message.weights, strict=True) if piece in part
            ]
            folded.append(self._mean(given, len(parts), value, self._shapes[piece]) if given else None)
        if self._stepper is not None:
            self.memory.changing(self.version)
            self._stepper.step(folded, message.rate)
        self.version = message.version
        self._copies.clear()
        self.memory.changed(self.version)

    def _mean(self, given: list[tuple[Tensor, float]], size: int, like: Tensor, shape: list[int]) -> Tensor:
        """The sum from left to right, divided by `size`: a gradient that is missing counts as zeros."""
        operands = [tensor if weight == 1.0 else tensor * weight for tensor, weight in given]
        key = like.dtype, size
        if key not in self._folders:
            self._folders[key] = Folder(ReduceOp.AVG, like.dtype, size)
        folder = self._folders[key]
        if folder.scales_first:
            operands = [operand / size for operand in operands]
        if len(operands) > 1:
            out = torch.empty_like(like)
            folder(out, operands, True)
        elif folder.scales_first or size == 1:
            out = operands[0]
        else:
            out = operands[0] / size
        return out.view(shape)

    def _discard(self, peer: bytes, request: int, message: m.Discard, frames: Sequence[Frame]) -> list[Result]:
        self._forget(message.dropped)
        return [Answer(peer, request, m.Done())]

    def _forget(self, gradients: Sequence[Gradient]) -> None:
        """A worker's gradients before one that was used or dropped are of no use either: it gave them up."""
        for worker, sequence, _ in gradients:
            self._done[worker] = max(sequence, self._done.get(worker, -1))
        for worker in {gradient.worker for gradient in gradients}:
            done = self._done[worker]
            for key in [key for key in self._held if key[0] == worker and key[1] <= done]:
                del self._held[key]
            self.memory.finished(worker, done)

    def _released(self) -> list[Result]:
        ready = [waiting for waiting in self._waiting if waiting.version <= self.version]
        self._waiting = [waiting for waiting in self._waiting if waiting.version > self.version]
        return [self._values(waiting.peer, waiting.request, waiting.pieces) for waiting in ready]

    # ------------------------------------------------------------------ all that it has

    def _show(self, peer: bytes, request: int, message: m.Show, frames: Sequence[Frame]) -> list[Result]:
        if message.version > self.version:
            return []
        text, tensors = self.state()
        told = Answer(message.peer.encode(), message.request, m.State(text), [tensor.clone() for tensor in tensors])
        return [Answer(peer, request, m.Done()), told]

    def _write(self, peer: bytes, request: int, message: m.Write, frames: Sequence[Frame]) -> list[Result]:
        if message.version > self.version:
            return []
        if message.version < self.version:
            return [Answer(peer, request, m.Written(self.number, PASSED))]
        text, tensors = self.state()
        copies = [tensor.clone() for tensor in tensors]
        return [Writing(message.folder, message.snapshot, self.number, text, copies, peer, request)]

    def _take(self, peer: bytes, request: int, message: m.State, frames: Sequence[Frame]) -> list[Result]:
        """Each worker may give the same state: the first one counts."""
        told = json.loads(message.text)
        if self._loaded != told["version"]:
            if self.version > 0:
                raise PolicyError(f"the state of version {told['version']} comes too late: it is at {self.version}")
            self.load_state(told, frames)
        return [Answer(peer, request, m.Done()), *self._released()]

    def state(self) -> tuple[str, list[Tensor]]:
        """JSON, and tensors that it refers to: values, and what the optimizer keeps."""
        rule, tensors = ({}, []) if self._stepper is None else self._stepper.state()
        told = {
            "version": self.version,
            "rule": None if self._rule is None else self._rule.as_json(),
            "pieces": [
                [number, self._shapes[number], str(value.dtype).removeprefix("torch."), self._groups[number]]
                for number, value in self.values.items()
            ],
            "stepper": rule,
            "kept": [[list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for tensor in tensors],
        }
        return json.dumps(told), [*self.values.values(), *tensors]

    def load_state(self, told: Any, frames: Sequence[Frame]) -> None:
        """Takes what `state` returned, instead of all values that are there; pieces stay where they are."""
        given = list(frames)
        unknown = self.values.keys() - {number for number, *_ in told["pieces"]}
        if unknown or len(given) != len(told["pieces"]) + len(told["kept"]):
            raise ValueError(f"a state of {len(given)} tensors; pieces {sorted(unknown)[:5]} are missing")
        version = int(told["version"])
        values = [as_tensor(given.pop(0), dtype_of(dtype)).view(shape) for _, shape, dtype, _ in told["pieces"]]
        kept = [as_tensor(given.pop(0), dtype_of(dtype)).view(shape).clone() for shape, dtype in told["kept"]]
        if told["rule"] is not None:
            rule = Rule.from_json(told["rule"])
            if self._rule is not None and not self._rule.fits(rule):
                raise ValueError(f"expected a state under the rule {self._rule}, got {rule}")
            places = [  # workers look for a piece where it is
                self._place_of(number, value) for (number, *_), value in zip(told["pieces"], values, strict=True)
            ]
            stepper = rule.stepper()
            for (_, shape, _, group), place in zip(told["pieces"], places, strict=True):
                stepper.add(place.view(shape), group)
            stepper.load_state(told["stepper"], kept)  # from here on nothing can fail
            self.memory.changing(self.version)
            self.values = {}  # in the order of the stepper
            for (number, shape, _, group), place, value in zip(told["pieces"], places, values, strict=True):
                place.copy_(value.reshape(-1))
                self.values[number], self._groups[number], self._shapes[number] = place, group, list(shape)
            self._rule, self._stepper = rule, stepper
        self.version = self._loaded = version
        self._copies.clear()
        self.memory.changed(self.version)

    def _place_of(self, number: int, value: Tensor) -> Tensor:
        place = self.values.get(number)
        if place is None:
            return self.memory.empty(value.numel(), value.dtype)
        if (place.numel(), place.dtype) != (value.numel(), value.dtype):
            raise ValueError(f"piece {number}: expected {place.numel()} of {place.dtype}, got {value.numel()}")
        return place

    _HANDLERS: ClassVar[dict[type[Any], Callable[..., list[Result]]]] = {
        m.Create: _create,
        m.Pull: _pull,
        m.Where: _where,
        m.Part: _part,
        m.Apply: _apply,
        m.Discard: _discard,
        m.State: _take,
        m.Show: _show,
        m.Write: _write,
    }


def as_tensor(frame: Frame, dtype: torch.dtype) -> Tensor:
    """The elements in a frame, without a copy. Raises `ValueError` if its bytes are no whole number of them."""
    if isinstance(frame, Tensor):
        return frame.reshape(-1)
    if not len(frame):
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(frame, dtype=dtype)


def bytes_of(frame: Frame) -> Any:
    """The memory of a tensor as bytes, without a copy."""
    if isinstance(frame, Tensor):
        flat: Any = frame.detach().reshape(-1).view(torch.uint8).numpy()
        return memoryview(flat) if frame.numel() else b""
    return frame


def dtype_of(name: Any) -> torch.dtype:
    """The dtype of that name, like "float32"."""
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype is called {name!r}")
    return dtype
