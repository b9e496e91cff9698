"""How the members that are left agree on who they are, and take in who waits.

The lowest rank that is alive decides. Everybody else comes to it and waits; it waits until each member of the old view
has come, has ended (nobody listens there any more), or does not answer. Its decision is one view for all. If it dies
first, the others go to the next lowest; if some already have its decision, those who come to them get the same. A view
counts once its members have connected by it; if one of them dies before that, they agree on the next one, with the next
generation. So of a generation there is one view among those who go on, or none.

A member that does not answer may be alive behind a cut network, and decide as well. So those who came must be more than
half of the members that are not known to have ended, or one half with the lowest of these ranks.

Compare view-synchronous communication (Birman and Joseph, SOSP 1987), and coordinator election (Garcia-Molina, IEEE
Transactions on Computers 1982).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ringred.errors import PeerFailed
from ringred.transports.membership.caller import Connection, Cut, Gone, Refused, Silent
from ringred.transports.membership.card import Card
from ringred.transports.membership.member import Coming, Member
from ringred.transports.membership.view import View
from ringred.transports.membership.wire import Malformed

__all__ = ["agree", "join"]

_LOOK_SECONDS = 0.05  # between two looks at who has ended
_ANSWER_SECONDS = 1.0  # in which a living process answers
_SILENT_SECONDS = 5.0  # after which one that does not answer is left out
_LOST_SECONDS = 30.0  # after which one that agrees, but does not come here, is left out
_CALLS = 16  # at once


def agree(member: Member, view: View, said: Mapping[str, Any], timeout: float) -> View:
    """The view after `view`, the same on all who get one. Collective among the living members of `view`. `said` is what
    this one tells all. If all of them say that they invite others (`said["invites"]`, how many there must be at least),
    those who wait to join are taken in, and waited for.

    A member that is alive, and does not call this within `timeout` seconds, is left out. Raises `PeerFailed` if this
    one was left out by the others, or if those who came are too few to go on.
    """
    known = _Known(member, view, time.monotonic() + timeout)
    with member.agreeing(view):
        after = member.successor(view)
        while after is None:
            first = known.first()
            decides = first.identity == member.identity
            after = _approved(known, _decide(known, said)) if decides else _follow(known, first, said)
    after = member.adopt(after)
    if after.rank_of(member.identity) is None:
        others = view.named(after.members)
        raise PeerFailed(f"{view.named([member.card])} of {view.lineage} was left out by those who went on: {others}")
    return after


def join(
    member: Member, lineage: str, members: Callable[[], list[Card]], said: Mapping[str, Any], timeout: float
) -> View:
    """The view of `lineage` that this member is let into, by those whose cards `members` gives, or who came after them.

    Raises `Silent` after `timeout` seconds, and `Gone` if none of them is there any more."""
    until = time.monotonic() + timeout
    ask = {"do": "join", "lineage": lineage, "card": member.card.as_text(), "said": dict(said)}
    gone_since: float | None = None
    while time.monotonic() < until:
        cards, there = members(), False
        tried: set[str] = set()
        while cards:
            card = cards.pop(0)
            if card.identity in tried:
                continue
            tried.add(card.identity)
            try:
                with member.call(card, _ANSWER_SECONDS) as connection:
                    there = True
                    connection.send(ask)
                    answer = _heard(connection, card, members, until)
            except (Gone, Silent, Cut, Refused, Malformed):
                continue
            if "view" in answer:
                return member.adopt(View.from_fields(answer["view"]))
            cards.insert(0, Card.from_text(answer["go"]))
        gone_since = None if there else (gone_since or time.monotonic())
        if gone_since is not None and time.monotonic() - gone_since > _SILENT_SECONDS:
            raise Gone(f"no member of {lineage} is there")
        time.sleep(_ANSWER_SECONDS / 4)
    raise Silent(f"no member of {lineage} let this process in within {timeout:g} s")


def _heard(connection: Connection, card: Card, members: Callable[[], list[Card]], until: float) -> dict[str, Any]:
    """The answer of `card`, as long as it is the one that decides."""
    while True:
        try:
            return connection.receive(min(_SILENT_SECONDS, max(0.0, until - time.monotonic())))
        except Silent:
            known = members()
            if time.monotonic() >= until or (known and known[0].identity != card.identity):
                raise


class _Known:
    """What one member knows of the others of `view` while it agrees."""

    def __init__(self, member: Member, view: View, until: float) -> None:
        self.member, self.view, self.until = member, view, until
        self.ended: set[str] = set()  # identities of processes that are no more
        self.silent_since: dict[str, float] = {}
        self.absent: set[str] = set()  # those who are alive, and did not come in time

    def left_out(self, identity: str) -> bool:
        """Whether nobody waits for this one: it has ended, has not answered for long, or does not come in time."""
        since = self.silent_since.get(identity)
        now = time.monotonic()
        silent = since is not None and now - since > _SILENT_SECONDS
        lost = now > self.until + _LOST_SECONDS and identity not in self.member.come(
            self.view
        )  # it cannot reach this one
        return silent or lost or identity in self.ended or identity in self.absent

    def ends(self, card: Card) -> None:
        """Nobody listens there. That proves the end of a process of this host, and of one that was reached before: else
        it may be that its address is not one at which this host reaches it."""
        if card.is_here() or card.identity in self.member.reached:
            self.ended.add(card.identity)
        else:
            self.silent_since.setdefault(card.identity, time.monotonic())

    def first(self) -> Card:
        """The lowest member that counts as alive."""
        return next(
            card
            for card in self.view.members
            if card.identity == self.member.identity or not self.left_out(card.identity)
        )

    def look(self, card: Card) -> View | None:
        """Asks whether `card` is alive, and which view it knows to follow."""
        try:
            with self.member.call(card, _ANSWER_SECONDS) as connection:
                ask = {"do": "ping", "lineage": self.view.lineage, "generation": self.view.generation}
                answer = connection.ask(ask, _ANSWER_SECONDS)
        except (Silent, Cut, Refused):
            self.silent_since.setdefault(card.identity, time.monotonic())
            return None
        except (Gone, Malformed):  # nobody listens there, or another process
            self.ends(card)
            return None
        self.silent_since.pop(card.identity, None)
        if answer.get("identity") != card.identity or answer.get("left"):
            self.ended.add(card.identity)
        if not answer.get("agrees") and time.monotonic() >= self.until:
            self.absent.add(card.identity)
        return None if answer.get("view") is None else View.from_fields(answer["view"])


def _decide(known: _Known, said: Mapping[str, Any]) -> View | None:
    """The view that this member, the lowest, decides; or the one that others have."""
    member, view = known.member, known.view
    with ThreadPoolExecutor(_CALLS, thread_name_prefix="ringred-look") as calls:
        while True:
            came = member.come(view)
            awaited = [
                card
                for card in view.members
                if card.identity != member.identity and card.identity not in came and not known.left_out(card.identity)
            ]
            if not awaited:
                break
            for after in calls.map(known.look, awaited):
                if after is not None:
                    return after
            with member.news:
                if len(member.come(view)) == len(came):
                    member.news.wait(_LOOK_SECONDS)
    here = [card for card in view.members if card.identity in came or card.identity == member.identity]
    _check_majority(known, here)
    told = {identity: coming.said for identity, coming in came.items()} | {member.identity: dict(said)}
    guests = _guests(known, told)
    told |= {guest.card.identity: guest.said for guest in guests}
    members = (*here, *(guest.card for guest in guests))
    return View(view.lineage, view.generation + 1, members, told, view.origin)


def _approved(known: _Known, after: View | None) -> View | None:
    """`after`, or the view in its place that one who decided before, and has ended since, left word of. Raises
    `PeerFailed` if others have gone on further."""
    if after is None or known.member.successor(known.view) is not None:
        return after
    counts = known.member.approved(after)
    if counts.generation == after.generation:
        return counts
    why = f"others of {after.lineage} have gone on, and were not asked"
    known.member.turn_away(known.view, why)
    raise PeerFailed(f"{known.view.named([known.member.card])} was left out: {why}")


def _guests(known: _Known, told: Mapping[str, Mapping[str, Any]]) -> list[Coming]:
    """Those who join with this view."""
    member, view = known.member, known.view
    if not all("invites" in what for what in told.values()):
        return []
    lacking = max(int(what["invites"]) for what in told.values()) - len(told)
    while True:
        with member.news:
            guests = list(member.joining(view.lineage).values())
            if len(guests) >= lacking:
                return guests
            left = known.until - time.monotonic()
            if left <= 0:
                break
            member.news.wait(left)
    why = f"{len(told)} ranks of {view.lineage} are left, {lacking} fewer than there must be, and no more have come"
    member.turn_away(view, why)
    raise PeerFailed(f"{view.named([member.card])}: {why}")


def _check_majority(known: _Known, here: list[Card]) -> None:
    possible = [card for card in known.view.members if card.identity not in known.ended or card in here]
    if 2 * len(here) > len(possible) or (2 * len(here) == len(possible) and possible[0] in here):
        return
    missing = known.view.named([card for card in possible if card not in here])
    why = (
        f"{len(here)} of {len(possible)} members of {known.view.lineage} came, and cannot go on: {missing} may be "
        "alive without them, behind a cut network or stopped"
    )
    known.member.turn_away(known.view, why)
    raise PeerFailed(f"{known.view.named([known.member.card])}: {why}")


def _follow(known: _Known, first: Card, said: Mapping[str, Any]) -> View | None:
    """The view that `first` decides, or None if it ends or falls silent before that."""
    member, view = known.member, known.view
    if time.monotonic() >= known.until:
        after = known.look(first)
        if after is not None or known.left_out(first.identity):
            return after
    try:
        connection = member.call(first, _ANSWER_SECONDS)
    except (Silent, Cut):
        known.silent_since.setdefault(first.identity, time.monotonic())
        return None
    except (Gone, Malformed):
        known.ends(first)
        return None
    try:
        connection.send(
            {
                "do": "come",
                "lineage": view.lineage,
                "generation": view.generation,
                "card": member.card.as_text(),
                "said": dict(said),
            }
        )
        while True:
            try:
                answer = connection.receive(_ANSWER_SECONDS)
            except Silent:
                after = known.look(first)  # it waits for others, or is stopped
                if after is not None or known.left_out(first.identity):
                    return after
                continue
            return View.from_fields(answer["view"])
    except Cut:
        return known.look(first)
    except (Refused, Malformed) as failure:
        raise PeerFailed(f"{view.named([member.card])}: {failure}") from None
    finally:
        connection.close()
