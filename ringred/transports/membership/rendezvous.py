"""Where the processes of a job find each other, kept by none of its ranks, so that it survives the death of any."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ringred.transports.membership.caller import Connection, Cut, Gone, Refused, Silent
from ringred.transports.membership.card import Card
from ringred.transports.membership.member import Member
from ringred.transports.membership.view import View
from ringred.transports.membership.wire import Malformed

__all__ = ["BOARD", "Rendezvous"]

BOARD = "rendezvous"
_SECONDS = 5.0


class Rendezvous(NamedTuple):
    """The process that keeps it, and the job's secret."""

    keeper: Card
    secret: bytes

    def tell(self, view: View) -> View:
        """Leaves word of a view, for those who come, and returns it; or the one of this or a later generation that was
        told of before. Where the keeper is gone, nobody comes by it any more."""
        name, text = f"view of {view.lineage} {view.origin}", json.dumps(view.as_fields())
        put = {name: text, _newest(view.lineage): text}
        answer = self._ask({"advance": name, "number": view.generation + 1, "put": put})
        if answer is None or answer["advanced"]:
            return view
        return View.from_fields(json.loads(str(answer["view"])))

    @classmethod
    def kept_by(cls, member: Member) -> Rendezvous:
        """One that a process of no rank keeps itself."""
        return cls(member.card, member.secret)

    def members(self, lineage: str) -> list[Card]:
        """Those that were told of last; empty if none were, or if the keeper is gone."""
        answer = self._ask({"look": [_newest(lineage)]})
        text = None if answer is None else answer.get(_newest(lineage))
        return [] if text is None else list(View.from_fields(json.loads(text)).members)

    def number(self, what: str) -> int:
        """How many have asked for this before. Raises `Gone` where the keeper is not there."""
        answer = self._ask({"add": what, "number": 1})
        if answer is None:
            raise Gone(f"nobody who knows the job's secret keeps a rendezvous at {self.keeper}")
        return int(answer["total"]) - 1

    def _ask(self, message: dict[str, object]) -> dict[str, Any] | None:
        try:
            with Connection(self.keeper, self.secret, _SECONDS) as connection:
                return connection.ask({"do": "board", "board": BOARD, **message}, _SECONDS)
        except (Gone, Silent, Cut, Refused, Malformed):
            return None


def _newest(lineage: str) -> str:
    """Under this name the last view is found by those who are in none yet."""
    return f"newest view of {lineage}"
