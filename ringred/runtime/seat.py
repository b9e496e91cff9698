"""A communicator's seat in its job: who its members are, beside the data, and how they connect when that changes."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ringred.errors import PeerFailed
from ringred.transports.base import Gather, Transport
from ringred.transports.membership.caller import Cut, Gone, Silent
from ringred.transports.membership.card import Card
from ringred.transports.membership.member import Member
from ringred.transports.membership.rendezvous import Rendezvous
from ringred.transports.membership.view import LINEAGE, View
from ringred.transports.membership.wire import Malformed

__all__ = ["Renewed", "Seat", "agreed_text", "check_alive", "has_ended", "own_address", "take"]

_REACHED = 256  # members of other hosts, at most, that are reached at the start
_CALLS = 32  # at once
_LOOK_SECONDS = 1.0  # in which a living member answers


class Renewed(NamedTuple):
    """The members of a new view, connected: see `connect.Connected`."""

    transport: Transport
    hosts: tuple[int, ...]
    gather: Gather


class Seat(NamedTuple):
    """The rank's `member`, which others reach, the `view` that its communicator has, and `connect`, which connects the
    members of another view. The latter is collective among them. `rendezvous` is where those who join ask, if any can.
    `part_ways`, if any, is called where members have ended and the others go on: their end is not to wait for those."""

    member: Member
    view: View
    connect: Callable[[Member, View], Renewed]
    rendezvous: Rendezvous | None = None
    part_ways: Callable[[], None] | None = None

    def part(self, name: str, ranks: Sequence[int], connect: Callable[[Member, View], Renewed] | None = None) -> Seat:
        """That of a communicator `name` of some of the ranks."""
        members = tuple(self.view.members[rank] for rank in ranks)
        view = self.member.adopt(View.first(name, members))
        part_ways = self.part_ways if len(members) == len(self.view.members) else None  # others know nothing of it
        return Seat(self.member, view, connect or self.connect, part_ways=part_ways)


def take(
    gather: Gather,
    rank: int,
    hosts: Sequence[object],
    interface: str | None,
    connect: Callable[[Member, View], Renewed],
    rendezvous: Rendezvous | None = None,
) -> Seat:
    """The seat of `rank` among all ranks of a job, which are on `hosts`. Collective.

    The job's secret is that of the rendezvous, or comes from rank 0, by the way that the ranks have of connecting.
    """
    text = "" if rank or rendezvous is not None else secrets.token_hex(32)
    secret = bytes.fromhex(gather(text)[0]) if rendezvous is None else rendezvous.secret
    far = len(set(hosts)) > 1 or (rendezvous is not None and rendezvous.keeper.port > 0)
    member = Member(secret, own_address(interface) if far else None)
    cards = tuple(Card.from_text(text) for text in gather(member.card.as_text()))
    view = member.adopt(View.first(LINEAGE, cards))
    if rendezvous is not None:
        member.approved = rendezvous.tell
        if rank == 0:
            rendezvous.tell(view)
    _reach_others(member, view)
    return Seat(member, view, connect, rendezvous)


def own_address(interface: str | None) -> str | None:
    """The address at which other hosts reach this one."""
    name = interface or socket.gethostname()
    try:
        found = socket.gethostbyname(name)
        if interface is not None or not found.startswith("127."):
            return found
        reason = f"it is {found}"
    except OSError as failure:
        reason = str(failure)
    warnings.warn(
        f"ringred: {name} has no address that other hosts reach ({reason}): their ranks cannot ask this one what it "
        "does, or go on with it after a failure; RINGRED_INTERFACE names one",
        stacklevel=2,
    )
    return None


def _reach_others(member: Member, view: View) -> None:
    """Notes which members of other hosts are reached at their addresses."""
    far = [card for card in view.members if card.port and not card.is_here()]
    if not far or len(far) > _REACHED:
        return

    def reach(card: Card) -> None:
        with contextlib.suppress(Gone, Silent, Cut, Malformed):
            member.call(card, _LOOK_SECONDS).close()
            member.reached.add(card.identity)

    with ThreadPoolExecutor(_CALLS, thread_name_prefix="ringred-reach") as calls:
        list(calls.map(reach, far))


def check_alive(member: Member, view: View) -> None:
    """Raises `PeerFailed` if a member of `view` has ended."""
    for rank, card in enumerate(view.members):
        if card.identity != member.identity and has_ended(member, card):
            raise PeerFailed(f"rank {rank} of {view.lineage} has ended ({card})")


def has_ended(member: Member, card: Card) -> bool:
    """Whether it is certain that the process of `card` has ended."""
    try:
        member.call(card, _LOOK_SECONDS).close()
    except (Gone, Malformed):
        return True
    except (Cut, Silent):
        pass
    return False


def agreed_text(gather: Gather, mine: object) -> object:
    """What rank 0 gives. Collective."""
    return json.loads(gather(json.dumps(mine))[0])
