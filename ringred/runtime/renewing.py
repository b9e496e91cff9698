"""The part of a communicator that goes on without those who have gone, and with those who come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch

from ringred.errors import CollectiveTimeout, PeerFailed, RingredError, TransportUnavailable
from ringred.runtime.seat import Renewed, Seat, agreed_text, has_ended
from ringred.runtime.stall import watch
from ringred.transports.membership.agree import agree, join
from ringred.transports.membership.caller import Gone, Silent
from ringred.transports.membership.view import View

__all__ = ["Renewing", "seated"]

C = TypeVar("C", bound="Renewing")


class Renewing:
    """What a communicator does when its ranks change. `seat` is None where there is one rank only."""

    rank: int
    size: int
    name: str
    seat: Seat | None
    successor: Any
    """The communicator that took its place, if one did."""
    noted: list[Callable[[str, Any], None]]
    """Called with what is noted, by its successor as well."""
    thread: int
    stalls: int
    """How often a call took so long that it said who was missing (RINGRED_STALL_SECONDS)."""

    def _take_seat(self, seat: Seat | None, stall_seconds: float) -> None:
        self.seat, self.successor = seat, None
        self._leaves = threading.Lock()  # taken by who leaves the seat, for good
        self.thread, self.stalls, self.noted = threading.get_ident(), 0, []
        self.recovery: Any = None  # what its models have in common, if they go on after failures
        if seat is not None:
            seat.member.hold()
            watch(self, stall_seconds)

    def _leave_seat(self) -> None:
        seat = self.seat
        if seat is not None and self._leaves.acquire(blocking=False):
            seat.member.leave(seat.view)
            seat.member.let_go()

    def drop_seat(self) -> None:
        """Is no part of its job any more, and tells nobody that this rank has left: it goes on in another view."""
        seat, self.seat = self.seat, None
        if seat is not None and self._leaves.acquire(blocking=False):
            seat.member.let_go()

    def note(self, name: str, value: Any) -> None:
        """Tells who asks what the ranks do (`ringred status`) a fact of this one, as JSON."""
        if self.seat is not None:
            self.seat.member.facts[name] = value
        for hear in self.noted:
            hear(name, value)

    def newest(self: C) -> C:
        """This communicator, or the one that took its place in the end."""
        comm = self
        while comm.successor is not None:
            comm = comm.successor
        return comm

    def shrink(self: C, timeout: float | None = None) -> C:
        """A communicator of the ranks that are left, in their order, once this one has failed. Collective among those
        that are alive. It takes this one's place, which is closed: tensors that `empty` gave remain.

        All that get one agree on who is in it. If a rank dies meanwhile, they agree again. A rank that is alive and
        does not call it within `timeout` seconds (default: that of collectives), or does not even answer for five
        seconds, is left out.

        Raises `PeerFailed` on a rank that was left out, and on all where those who came cannot know that they are the
        only ones: more than half of the ranks that have not ended must come, or one half with the lowest of them.
        """
        return self.renew(lambda view: {}, timeout=timeout)

    def awaited_by_guests(self) -> bool:
        """Whether some process waits at this rank to join."""
        return self.seat is not None and bool(self.seat.member.joining(self.seat.view.lineage))

    def renew(self: C, tells: Callable[[View], Mapping[str, Any]], timeout: float | None = None) -> C:
        """As `shrink`, with what each rank tells all the others of itself in a view that it leaves; it is then in
        `seat.view.said`. If all say that they invite others (see `agree`), processes that wait to join become the last
        ranks; on such a process it waits for that."""
        comm: Any = self
        if self.seat is None:
            raise RingredError(f"rank {self.rank}: {self.name}: expected a communicator of ranks that reach each other")
        seat, seconds = self.seat, comm.config.timeout if timeout is None else timeout
        view, deadline = seat.view, time.monotonic() + seconds
        while True:
            joins = view.generation < 0
            said = tells(view)
            view = _joined(seat, said, seconds) if joins else agree(seat.member, view, said, seconds)
            made = None
            try:
                made = seated(comm, seat._replace(view=view), seat.connect(seat.member, view))
                made.barrier()
                _part_ways(made, seat)
            except (PeerFailed, CollectiveTimeout, TransportUnavailable):
                if made is not None:
                    made.drop_seat()
                    made.close()
                if time.monotonic() >= deadline:
                    raise
                continue
            break
        made.noted = self.noted
        self.successor = made
        comm.close()
        return cast("C", made)


def _part_ways(made: Any, before: Seat) -> None:
    """Has the ranks of `made` end without the members of `before` that it lost, if all know that those have ended; if
    not, never: one that lives would wait for them. Collective."""
    lost = [card for card in before.view.members if made.seat.view.rank_of(card.identity) is None]
    if before.part_ways is None or not lost:
        return
    known = torch.tensor([all(has_ended(before.member, card) for card in lost)])
    made.all_reduce(known, "min", algorithm="one_shot")
    if known.item():
        before.part_ways()
    else:
        made.seat = made.seat._replace(part_ways=None)


def _joined(seat: Seat, said: Mapping[str, Any], seconds: float) -> View:
    """The view into which this process is let."""
    assert seat.rendezvous is not None, "who joins was told where"
    lineage = seat.view.lineage
    try:
        return join(seat.member, lineage, partial(seat.rendezvous.members, lineage), said, seconds)
    except (Gone, Silent) as failure:
        raise TransportUnavailable(
            f"this process was to join a job that is over, or does not go on: {failure}"
        ) from None


def seated(comm: Any, seat: Seat, connected: Renewed) -> Any:
    """The communicator of `seat`'s view, made as `comm`, with the costs that rank 0 knows. Collective."""
    transport, hosts, gather = connected
    name = f"{seat.view.lineage}~{seat.view.generation}"
    made = type(comm)(transport, hosts=hosts, config=comm.config, name=name, device=comm.device, seat=seat)
    try:
        tuning = cast("dict[str, list[float]]", agreed_text(gather, comm.tuning))
        made.tune({kind: cast("Any", tuple(costs)) for kind, costs in tuning.items()})
    except BaseException:
        made.drop_seat()
        made.close()
        raise
    return made
