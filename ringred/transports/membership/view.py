"""A view: who takes part in a communicator, as all of them have agreed. Each failure or arrival makes a new one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ringred.transports.membership.card import Card
from ringred.transports.membership.wire import Malformed

__all__ = ["LINEAGE", "View"]

LINEAGE = "world"
"""The name of the communicator of all ranks of a job, whatever its generation."""


@dataclass(frozen=True, slots=True)
class View:
    """The members of the communicator `lineage`, by rank, in its `generation`: 0 as it was made, one more with each
    change. `said` has what each of them said when they agreed on it, by identity. `origin` is the same in all views of
    one communicator, and another in those of one that has its name: other ranks may have given it to theirs."""

    lineage: str
    generation: int
    members: tuple[Card, ...]
    said: Mapping[str, Mapping[str, Any]]
    origin: str = ""

    @classmethod
    def first(cls, lineage: str, members: tuple[Card, ...]) -> View:
        """That of a communicator as it is made."""
        return cls(lineage, 0, members, {}, _who(members))

    @property
    def key(self) -> str:
        """A text that no other view has, even one of the same generation that others agreed on."""
        return f"{self.lineage}~{self.generation}.{_who(self.members)}"

    def rank_of(self, identity: str) -> int | None:
        """The rank of a member, or None."""
        return next((rank for rank, card in enumerate(self.members) if card.identity == identity), None)

    def named(self, cards: Iterable[Card]) -> str:
        """Members as text."""
        ranks = [self.rank_of(card.identity) for card in cards]
        return ", ".join(f"rank {rank}" if rank is not None else "a rank that has joined" for rank in ranks)

    def as_fields(self) -> dict[str, Any]:
        """What `from_fields` reads."""
        return {
            "lineage": self.lineage,
            "generation": self.generation,
            "members": [card.as_text() for card in self.members],
            "said": {identity: dict(what) for identity, what in self.said.items()},
            "origin": self.origin,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> View:
        """Raises `Malformed`."""
        try:
            members = tuple(Card.from_text(text) for text in fields["members"])
            said, origin = dict(fields["said"]), str(fields["origin"])
            return cls(str(fields["lineage"]), int(fields["generation"]), members, said, origin)
        except (KeyError, TypeError, ValueError) as failure:
            raise Malformed(f"no view: {failure!r}") from None


def _who(members: Iterable[Card]) -> str:
    return hashlib.blake2b(" ".join(card.identity for card in members).encode(), digest_size=6).hexdigest()
