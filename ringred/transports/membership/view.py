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
    change. `said` has what each of them said when they agreed on it, by identity."""

    lineage: str
    generation: int
    members: tuple[Card, ...]
    said: Mapping[str, Mapping[str, Any]]

    @property
    def key(self) -> str:
        """A text that no other view has, even one of the same generation that others agreed on."""
        who = hashlib.blake2b(" ".join(card.identity for card in self.members).encode(), digest_size=6).hexdigest()
        return f"{self.lineage}~{self.generation}.{who}"

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
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> View:
        """Raises `Malformed`."""
        try:
            members = tuple(Card.from_text(text) for text in fields["members"])
            return cls(str(fields["lineage"]), int(fields["generation"]), members, dict(fields["said"]))
        except (KeyError, TypeError, ValueError) as failure:
            raise Malformed(f"no view: {failure!r}") from None
