"""Goes on after a failure: the ranks that are left agree on how far each had come, and repeat what not all have done.

All ranks pass through the same phases: the collectives before a forward, and the reductions of a backward with one more
behind them (`commit`), which nobody passes before all have their gradients. So when ranks fail, the others are at most
one backward apart, and those behind have all that they need to finish it alone, with the same bits. The phase that
nobody has passed is repeated over the ranks that are left, from the gradients of each, which are kept until then. No
gradient is counted twice or lost but those of the ranks that are gone, and no optimizer steps twice or half.

A forward's collectives may have been passed by some and not by others (the root of a broadcast runs ahead); those
behind leave them out.

Processes that join do so before a forward, where all ranks are equally far: `commit` tells all that somebody waits.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from ringred.communicator import Communicator
from ringred.data_parallel.trees import broadcast_tree, uprooted
from ringred.errors import CollectiveTimeout, PeerFailed, RingredError, TransportUnavailable
from ringred.runtime.folds import ReduceOp
from ringred.runtime.seat import check_alive
from ringred.transports.membership.view import View

__all__ = ["RECOVERABLE", "Change", "Party", "Recovery"]

RECOVERABLE = (PeerFailed, CollectiveTimeout)
"""What the ranks that are left can go on after."""
A = TypeVar("A")
_JOINS = -1  # the phases of a rank that has none yet


class Change(NamedTuple):
    """From `size` ranks to others. By rank from then on: the rank that each had before, None for those that join, and
    what its party told (`Party.tells`), None as well."""

    size: int
    was: Sequence[int | None]
    told: Sequence[Any]


class Party(Protocol):
    """Who goes on over other ranks. All ranks have the same parties, in the same order."""

    def tells(self) -> Any:
        """What those on all ranks have to know of this one (JSON)."""

    def follow(self, change: Change) -> None:
        """Does what follows from `change` by itself: on all ranks that were there, but not on those that join."""

    def adopt(self, comm: Communicator) -> None:
        """Goes on over `comm`. Collective; may fail, and be called again with another."""

    def handed_over(self) -> Any:
        """What one that joins needs: tensors and plain data (`trees`)."""

    def take_over(self, state: Any) -> None:
        """Goes on as one that has joined."""


class Recovery:
    """What the parties of a communicator have in common. `recoveries` are the seconds that each change has taken.
    `hands_over` is whether there is all that a process needs to join, as it does between two rounds of the program."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.recoveries: list[float] = []
        self.hands_over = False
        self._joins = comm.seat is not None and comm.seat.view.generation < 0
        self.optimizers: set[int] = set()
        """Those whose steps make a round of the program."""
        self._stepped: set[int] = set()
        self._due = False
        self._first: weakref.ref[Party] | None = None
        self._phases = 0  # passed by this rank
        self._known = 0  # passed by some rank, when they changed last
        self._followed = comm.seat.view.generation if comm.seat is not None else 0
        self._awaited = False  # whether somebody waits to join
        self._flag: tuple[Communicator, torch.Tensor] | None = None  # zero but within `_commit`
        self._parties: list[Callable[[], Party | None]] = []

    @classmethod
    def of(cls, comm: Communicator) -> Recovery:
        """That of `comm`, or of what took its place: one for all of its parties."""
        comm = comm.newest()
        if comm.recovery is None:
            comm.recovery = cls(comm)
        found: Recovery = comm.recovery
        return found

    def enrol(self, party: Party) -> None:
        """From here on `party` takes part in changes."""
        self._parties.append(weakref.ref(party))

    def withdraw(self, party: Party) -> None:
        """`party` was never whole, and takes part no more; its place stays."""
        self._parties = [_nobody if one() is party else one for one in self._parties]

    # ------------------------------------------------------------------ phases

    def behind(self) -> bool:
        """Whether other ranks had passed this rank's phase when they changed."""
        return self._phases < self._known

    def passed(self) -> None:
        """This rank is through a phase."""
        self._phases += 1

    def _commit(self) -> None:
        """Returns once all ranks have what they reduced before it. Collective."""
        waits = self.comm.awaited_by_guests() or self.comm.size < self.comm.config.least_ranks
        if self._flag is None or self._flag[0] is not self.comm:
            self._flag = self.comm, self.comm.empty(1, torch.int64).zero_()
        _, awaited = self._flag
        if self.hands_over and waits:
            awaited.fill_(1)
        self.comm.all_reduce_for("the end of a backward", awaited, ReduceOp.MAX)
        self._awaited = bool(awaited.item())
        if self._awaited:
            awaited.zero_()
        self.passed()

    def backward_done(self) -> None:
        """A backward of some model was reduced: optimizers have something to do."""
        self._due = True

    def stepped(self, optimizer: int) -> None:
        """An optimizer has made its step."""
        self._due = False
        self._stepped.add(optimizer)

    def _at_the_top(self, party: Party) -> bool:
        """Whether the program is where each of its rounds begins, with the model that the first one began with: every
        optimizer has made a step since the last time, and no gradients are left for one. The same on all ranks."""
        if self._first is None:
            self._first = weakref.ref(party)
        stepped = not self._due and self._stepped >= self.optimizers
        top = not self.optimizers or (stepped and self._first() is party)
        if top:
            self._stepped.clear()
        return top

    def between_steps(self, party: Party) -> None:
        """Called before each forward of a model whose backward is reduced. Lets in who waits. Collective."""
        if self._joins and not self.hands_over:
            raise RingredError(
                "a process that joins a training needs all that the others have: make a ringred.Elastic of the model, "
                "the optimizer and the sampler, and loop over its epochs() or steps()"
            )
        if self._at_the_top(party) and (self._joins or self._awaited):
            self.renew(None)

    def join(self) -> None:
        """Waits until this process is let in, if it is one that joins."""
        if self._joins:
            self.renew(None)

    def through(self, phase: Callable[[], None]) -> bool:
        """Calls `phase`, the collectives before a forward, until they succeed; False if other ranks had passed them."""
        while not self.behind():
            try:
                phase()
                self.passed()
                return True
            except (*RECOVERABLE, TransportUnavailable) as failure:
                self.renew(self._of_a_death(failure))
        self.passed()
        return False

    def carried(self, attempt: A, comm: Communicator, again: Callable[[], A], wait: Callable[[A], None]) -> A:
        """`attempt`, collectives that have begun over `comm`, or what `again` began in its place over other ranks, once
        `wait` has returned on all of them."""
        while True:
            try:
                if comm is not self.comm and not self.behind():
                    comm, attempt = self.comm, again()
                wait(attempt)
                if self.behind():  # others know that all have it
                    self.passed()
                else:
                    self._commit()
                return attempt
            except RECOVERABLE as failure:
                self.renew(failure)

    # ------------------------------------------------------------------ changes

    def renew(self, failure: BaseException | None) -> None:
        """All parties go on without the ranks that are gone; if there is no `failure`, with those that wait to join.
        Collective. Raises where they cannot: see `Communicator.shrink`."""
        began, size = time.monotonic(), self.comm.size
        while True:
            before = self.comm
            made = before.newest()
            try:
                if made is before:
                    made = before.renew(partial(self._tells, failure is None))
                self._adopt(before, made)
            except (*RECOVERABLE, TransportUnavailable) as another:
                if self.comm is before:
                    raise
                failure = self._of_a_death(another)
                continue
            break
        self._awaited = False
        self.recoveries.append(time.monotonic() - began)
        if made.rank == 0:
            what = f"ringred: {made.size} ranks go on ({size} before) after {self.recoveries[-1]:.2f} s"
            print(what if failure is None else f"{what}; {failure}", file=sys.stderr, flush=True)

    def _of_a_death(self, failure: RingredError) -> RingredError:
        """What ranks go on after: a transport that cannot be made is such a failure where a rank has ended, else it is
        raised."""
        if not isinstance(failure, TransportUnavailable):
            return failure
        if self.comm.seat is not None:
            try:
                check_alive(self.comm.seat.member, self.comm.seat.view)
            except PeerFailed as gone:
                return gone
        raise failure

    def _tells(self, between_steps: bool, view: View) -> dict[str, Any]:
        """What this rank tells in `view`, which it leaves: all changes up to there are followed before."""
        if self._joins:
            return {"phases": _JOINS}
        self._follow_up_to(view)
        alive = self._alive()
        told = [None if party is None else party.tells() for party in alive]
        there = [party is not None for party in alive]
        said: dict[str, Any] = {"phases": self._phases, "told": told, "there": there}
        if between_steps:
            said["invites"] = self.comm.config.least_ranks
        return said

    def _alive(self) -> list[Party | None]:
        return [party() for party in self._parties]

    def _adopt(self, before: Communicator, made: Communicator) -> None:
        assert made.seat is not None, "it has members"
        self.comm, view = made, made.seat.view
        made.recovery, before.recovery = self, None
        if not self._joins:
            self._follow_up_to(view)
        self._followed = view.generation
        # A party that some rank has let go of, and another not yet, is none.
        theres = [one["there"] for one in view.said.values() if "there" in one]
        for place, party in enumerate(self._alive()):
            if party is not None and all(_at(there, place) for there in theres):
                party.adopt(made)
        self._hand_over(view)

    def _follow_up_to(self, view: View) -> None:
        assert self.comm.seat is not None, "it has members"
        member = self.comm.seat.member
        for generation in range(self._followed + 1, view.generation + 1):
            self._follow(member.known(view.lineage, generation - 1), member.known(view.lineage, generation))
            self._followed = generation

    def _all_state(self) -> tuple[str, Any]:
        """What is wrong with the state of all parties, if anything is, and the state."""
        states = [None if party is None else party.handed_over() for party in self._alive()]
        try:
            uprooted(states)
        except TypeError as failure:  # no reason for those that are there to end
            return str(failure), None
        return "", [self._phases, states]

    def _follow(self, before: View, after: View) -> None:
        """All parties follow one change: some ranks may have connected in a view that others only know of."""
        said = [after.said.get(card.identity, {}) for card in after.members]
        self._known = max(int(one.get("phases", 0)) for one in said)
        joins = [one.get("phases") == _JOINS for one in said]
        was = [None if new else before.rank_of(card.identity) for new, card in zip(joins, after.members, strict=True)]
        for place, party in enumerate(self._alive()):
            if party is not None:
                told = [_at(one.get("told", ()), place) for one in said]
                party.follow(Change(len(before.members), was, told))

    def _hand_over(self, view: View) -> None:
        if not any(one.get("phases") == _JOINS for one in view.said.values()):
            return
        if view.said[view.members[0].identity].get("phases") == _JOINS:
            raise RingredError("those who had the state of the training are gone: only processes that joined are left")
        trouble, state = self._all_state() if self.comm.rank == 0 else ("", None)
        trouble, state = broadcast_tree(self.comm, [trouble, state])
        self.comm.barrier()  # until all have it, nobody goes on from what it says
        if not self._joins:
            return
        if trouble:
            raise RingredError(f"this process cannot join: {trouble}")
        phases, states = state
        if len(states) != len(self._parties):
            raise RingredError(
                f"the ranks that are there have {len(states)} models, samplers and Elastic objects that go on after "
                f"failures, this process has {len(self._parties)}: it runs another program"
            )
        for party, state in zip(self._alive(), states, strict=True):
            if party is not None:
                party.take_over(state)
        self._joins, self._phases, self._known = False, phases, phases


def _nobody() -> None:
    """A party that is none."""


def _at(values: Sequence[Any], place: int) -> Any:
    """A rank's value for a party; None for one that it has not made yet."""
    return values[place] if place < len(values) else None
