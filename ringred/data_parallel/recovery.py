"""Goes on after a failure: the ranks that are left agree on how far each had come, and repeat what not all have done.

All ranks pass through the same phases: the collectives before a forward, and the reductions of a backward with one more
behind them (`commit`), which nobody passes before all have their gradients. So when ranks fail, the others are at most
one backward apart, and those behind have all that they need to finish it alone, with the same bits. The phase that
nobody has passed is repeated over the ranks that are left, from the gradients of each, which are kept until then. No
gradient is counted twice or lost but those of the ranks that are gone, and no optimizer steps twice or half.

A forward's collectives may have been passed by some and not by others (the root of a broadcast runs ahead); those
behind leave them out.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ringred.communicator import Communicator
from ringred.errors import CollectiveTimeout, PeerFailed
from ringred.runtime.folds import ReduceOp

__all__ = ["RECOVERABLE", "Change", "Party", "Recovery"]

RECOVERABLE = (PeerFailed, CollectiveTimeout)
"""What the ranks that are left can go on after."""


class Change(NamedTuple):
    """The ranks go on over `comm`. By rank there: the rank that each had before, None for those that join, and what its
    party told (`Party.tells`). Before, there were `size` ranks."""

    comm: Communicator
    was: Sequence[int | None]
    told: Sequence[Any]
    size: int


class Party(Protocol):
    """Who goes on over other ranks. All ranks have the same parties, in the same order."""

    def tells(self) -> Any:
        """What those on all ranks have to know of this one (JSON)."""

    def adopt(self, change: Change) -> None:
        """Goes on over the ranks of `change`. Collective; may be called again if that fails."""


class Recovery:
    """What the parties of a communicator have in common. `recoveries` are the seconds that each change has taken."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.recoveries: list[float] = []
        self._phases = 0  # passed by this rank
        self._known = 0  # passed by some rank, when they changed last
        self._parties: list[weakref.ref[Party]] = []

    @classmethod
    def of(cls, comm: Communicator) -> Recovery:
        """That of `comm`, one for all of its parties."""
        found = _known.get(comm)
        if found is None:
            found = _known[comm] = cls(comm)
        return found

    def enrol(self, party: Party) -> None:
        """From here on `party` takes part in changes."""
        self._parties.append(weakref.ref(party))

    # ------------------------------------------------------------------ phases

    def behind(self) -> bool:
        """Whether other ranks had passed this rank's phase when they changed."""
        return self._phases < self._known

    def passed(self) -> None:
        """This rank is through a phase."""
        self._phases += 1

    def commit(self) -> None:
        """Returns once all ranks have their gradients. Collective."""
        with self.comm.for_purpose("the end of a backward"):
            self.comm.all_reduce(torch.zeros(1, dtype=torch.int64), ReduceOp.MAX)
        self.passed()

    def through(self, phase: Callable[[], None]) -> bool:
        """Calls `phase`, the collectives before a forward, until they succeed; False if other ranks had passed them."""
        while not self.behind():
            try:
                phase()
                self.passed()
                return True
            except RECOVERABLE as failure:
                self.renew(failure)
        self.passed()
        return False

    # ------------------------------------------------------------------ changes

    def renew(self, failure: BaseException) -> None:
        """All parties go on without the ranks that are gone. Collective. Raises where they cannot: see
        `Communicator.shrink`."""
        began = time.monotonic()
        while True:
            before = self.comm
            made = before.newest()
            if made is before:
                told = [None if party is None else party.tells() for party in self._alive()]
                made = before.renew({"phases": self._phases, "told": told})
            try:
                self._adopt(before, made)
            except RECOVERABLE as another:
                failure = another
                continue
            break
        self.recoveries.append(time.monotonic() - began)
        if made.rank == 0:
            print(
                f"ringred: {made.size} of {before.size} ranks go on after {self.recoveries[-1]:.2f} s; {failure}",
                file=sys.stderr,
                flush=True,
            )

    def _alive(self) -> list[Party | None]:
        return [party() for party in self._parties]

    def _adopt(self, before: Communicator, made: Communicator) -> None:
        assert made.seat is not None, "it has members"
        assert before.seat is not None, "it had members"
        self.comm, view = made, made.seat.view
        _known[made] = self
        said = [view.said.get(card.identity, {}) for card in view.members]
        was = [before.seat.view.rank_of(card.identity) for card in view.members]
        self._known = max(int(one.get("phases", 0)) for one in said)
        for place, party in enumerate(self._alive()):
            if party is not None:
                told = [one.get("told", {place: None})[place] for one in said]
                party.adopt(Change(made, was, told, before.size))


_known: weakref.WeakKeyDictionary[Communicator, Recovery] = weakref.WeakKeyDictionary()
