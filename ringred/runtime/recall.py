"""Calls that were made before, and are played again without Python where the transport's player remembers them."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from ringred.runtime.calls import Prepared
from ringred.runtime.executor import Plan
from ringred.runtime.folds import SUPPORTED
from ringred.transports.base import Tape, Transport

__all__ = ["Never", "Recall", "contract", "recall", "remember"]

_STRIDE = 0x9E3779B97F4A7C15
_62_BITS = (1 << 62) - 1


def contract(digest: int, number: int) -> int:
    """The 62 bits that must be equal on all ranks in their `number`-th call, whose arguments `digest` represents."""
    return digest + number * _STRIDE & _62_BITS


class Recall(Protocol):
    """What a runner and the class of native/recall.c tell each other. Both hold the order of calls meanwhile."""

    armed: bool
    """Whether calls may be recalled: nothing is under way, and nothing but the call itself has to be done."""
    stale: bool
    """Whether all calls are to be forgotten."""
    one_way: bool
    """Whether the runner is told of each call."""
    number: int
    """The number of the last collective, by whatever way."""
    recalled: int
    """The number of the last call that was recalled; 0 if another came after it."""
    last: Any
    """That call, as it was prepared."""
    timeout_ns: int
    """How long each call may take."""

    def play(self, prepare: object, /, *arguments: object) -> bool:
        """Whether a call that was kept for these arguments was played."""
        ...

    def keep(self, *what: Any) -> None:
        """Keeps a call, see native/recall.c."""


class Never:
    """Recalls nothing, and counts."""

    armed = stale = one_way = False
    recalled = timeout_ns = 0
    last: Any = None

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def play(self, prepare: object, /, *arguments: object) -> bool:
        return False

    def keep(self, *what: Any) -> None:
        pass


def recall(transport: Transport, order: RLock, doings: object, *calls: Callable[..., None]) -> Recall:
    """The memory of a runner's calls. What does not end at once is made the current one of `doings`, and left to the
    first of `calls`; the others are the `abandon` and `note` of native/recall.c."""
    if transport.player is None:
        return Never()
    examples = tuple((torch.empty(0, dtype=dtype), dtype) for dtype in SUPPORTED)
    made: Recall = transport.player.recall(order.acquire, order.release, Tensor, examples, doings, *calls, _STRIDE)
    return made


def remember(memory: Recall, prepared: Prepared, counted: int, identity: tuple[Any, ...]) -> None:
    """Keeps a call that was played, where its tape is all there is to play. `counted` is the address of the number of
    the last such call; 0: that of collectives."""
    plan = prepared.plan
    if type(plan) is Plan and isinstance(plan.tape, Tape) and prepared.scaled is None:
        tape, left = plan.tape, prepared.one_way and plan.tape.sends
        memory.keep(prepared, tape, tape.address, prepared.call.digest, counted, left, identity)
