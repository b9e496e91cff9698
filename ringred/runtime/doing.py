"""What a communicator does and did: the call that is under way, the last one, and those that it left before others."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Set
from types import FrameType
from typing import NamedTuple, TypeAlias

from ringred.runtime.call_site import call_site
from ringred.runtime.calls import Call, Prepared
from ringred.runtime.recall import Never, Recall

__all__ = ["Doing", "Doings"]

_ONE_WAY = 64  # collectives that this rank may have left before others began, and that are remembered


class Doing(NamedTuple):
    """A call as errors name it: its number among the collectives, its text, and its place in the user's program."""

    number: int
    text: str
    site: str


Current: TypeAlias = tuple[int, Call, "str | FrameType", bool]
"""A call that is under way: its number, itself, the frame that made it or its place, and whether it is of two ranks."""


class Doings:
    """Of one communicator. Its `recall` counts them, and plays those that were made before."""

    def __init__(self) -> None:
        self.recall: Recall = Never()
        self.current: Current | None = None
        self._last: tuple[int, Call] | None = None
        self._one_way: deque[Current] = deque(maxlen=_ONE_WAY)  # done perhaps before others began, since all last had

    def ended(self) -> None:
        """The current call is over."""
        current = self.current
        assert current is not None, "it began"
        self._last, self.current, self.recall.recalled = current[:2], None, 0

    def now(self) -> Doing:
        """The call that is under way."""
        return self._told_of(self.current)

    def seen(self) -> tuple[object, Doing, bool]:
        """The call that is under way, or the last one (without its place), as any thread may ask: what no other call
        equals, what it is, and whether it is under way."""
        current, last, recalled = self.current, self._last, self.recall.recalled
        if current is not None:
            return (current[0], id(current)), self._told_of(current), True
        if recalled:
            last = recalled, self.recall.last.call
        done = self._told_of(None) if last is None else Doing(self.recall.number, last[1].numbered(last[0]), "")
        return None, done, False

    def note(self, prepared: Prepared, number: int, site: str | FrameType, sent: bool) -> None:
        """Remembers that a collective was done, perhaps before others began it, or that all have come so far."""
        if prepared.one_way:
            if sent:
                place = site if isinstance(site, str) else call_site(site)
                self._one_way.append((number, prepared.call, place, False))
        elif self._one_way and prepared.pair is None:
            self._one_way.clear()
        self.recall.one_way = bool(self._one_way)

    def noted(self, prepared: Prepared, number: int, left: bool) -> None:
        """As `note`, of a call that was recalled, and that this rank may have `left` before others began it."""
        self.note(prepared, number, sys._getframe(1), left)

    @property
    def left_others(self) -> bool:
        """Whether calls are remembered that others may not have begun."""
        return bool(self._one_way)

    def differed(self, turns: Set[int], failing: Doing | None) -> Doing:
        """The call that others, which fail in `turns`, see differently: one that this rank has left, or else the last
        of those, or `failing`."""
        left = [self._told_of(one) for one in self._one_way]
        return next((one for one in left if one.number in turns), left[-1] if failing is None else failing)

    def _told_of(self, current: Current | None) -> Doing:
        if current is None:
            return Doing(self.recall.number, "no collective", "")
        number, call, site, of_a_pair = current
        # All ranks count collectives in the same way; a call between two ranks gets the number of the last collective.
        turn = self.recall.number if of_a_pair else number
        return Doing(turn, call.numbered(number), site if isinstance(site, str) else call_site(site))
