"""A collective in its prepared form: what `communicator` hands down to `runner`, which plays it."""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple, TypeAlias

from torch import Tensor

from ringred.collectives.registry import Algorithm
from ringred.runtime.executor import Plan
from ringred.runtime.folds import ReduceOp
from ringred.schedule.ir import Group

__all__ = ["Call", "Copies", "Native", "Post", "Prepared", "digest"]

Copies: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
"""Pairs of a target and the source that is copied into it, in this order."""


class Call(NamedTuple):
    """A collective whose algorithm is settled. `digest` stands for everything that all ranks must ask for alike."""

    collective: str
    text: str
    algorithm: Algorithm
    group: Group
    digest: int
    purpose: str = ""

    def numbered(self, number: int) -> str:
        """The text of the `number`-th such call."""
        head, _, rest = self.text.partition(" ")
        return f"{head} #{number} {rest}"

    def for_purpose(self, purpose: str) -> Call:
        """The same call, which only meets calls for the same `purpose` on the other ranks."""
        text, value = f"{self.text} for {purpose}", self.digest ^ digest(purpose)
        return self._replace(text=text, digest=value, purpose=purpose)

    def at_site(self, site: str) -> Call:
        """The same call, which only meets those of the same place. Of its file the name counts: hosts may keep the
        program in different folders."""
        return self._replace(digest=self.digest ^ digest(os.path.basename(site)))


class Native(NamedTuple):
    """In the place of a plan: the transport's own all-reduce of `tensor`, in place."""

    tensor: Tensor
    op: ReduceOp


class Post(NamedTuple):
    """In the place of a plan: `parts`, which nobody else writes to, are sent to `peer` and waited for later."""

    peer: int
    parts: tuple[Tensor, ...]


class Prepared(NamedTuple):
    """A call with its plan, and the copies that are made before (`fill`) and after it (`back`).

    `scaled` is divided by the number of ranks between `fill` and the plan, where a mean is scaled first. `pair` is the
    sender and the receiver of what concerns two ranks only. `one_way` says that this rank may be done before others
    have begun, so that it does not see whether they make the same call.
    """

    call: Call
    plan: Plan | Native | Post
    fill: Copies = ()
    back: Copies = ()
    scaled: Tensor | None = None
    pair: tuple[int, int] | None = None
    one_way: bool = False


def digest(text: str) -> int:
    """56 bits that stand for `text`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
