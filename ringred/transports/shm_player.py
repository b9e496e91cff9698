"""Plays tapes over `shm` by the compiled player, which works on the same words as shm.py and shm_sending.py."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ringred import native
from ringred.transports.base import Fault, FaultKind, Tape
from ringred.transports.links import LAYOUT, QUEUED, SHARED, Link, State

__all__ = ["ShmPlayer", "engine", "unusable"]

_LEVELS = ("plain C", "AVX2", "AVX-512")
_DONE, _LOOK, _LATE, _MISMATCH = range(4)
_LAST_LOOK = 1


def unusable() -> str | None:
    """Why plans are not played by the compiled player, or None if they are."""
    if native.player is None:
        return native.reason
    assert native.player.layout() == LAYOUT, "one version, one layout"
    return None


def engine(player: object) -> str:
    """What runs plans on shared memory, in words; `player` is that of the transport."""
    if player is None:
        return f"Python ({unusable() or 'RINGRED_COMPILED=off, here or on another rank'})"
    assert native.player is not None, "it is there"
    return f"the compiled player ({_LEVELS[native.player.level()]})"


class ShmPlayer:
    """The player of a transport with this `state` and these `links`, in the order of their words. Its slots for
    messages to several peers are at offset `shared`.

    `check` raises `Fault` if no collective can begin; `left` says why a peer is gone, or None.
    """

    def __init__(
        self,
        state: State,
        links: Sequence[Link],
        shared: int,
        check: Callable[[], None],
        left: Callable[[Link], str | None],
    ) -> None:
        assert native.player is not None, "a player is only made where there is one"
        self._own, self._links = state.own, list(links)
        self._own[SHARED] = shared
        self._check, self._left = check, left
        self.links: Mapping[int, int] = {link.rank: number for number, link in enumerate(links)}
        self._play = partial(native.player.play, state.address)
        self.recall: Callable[..., Any] = partial(native.player.Recall, self, state.address)

    def ready(self) -> bool:
        """Whether no send waits for room that was started without the player."""
        return not self._own[QUEUED]

    def play(self, tape: Tape, contract: int, timeout_ns: int, times: array[int] | None) -> None:
        """As `base.Player` says."""
        noted = 0 if times is None else times.buffer_info()[0]
        gone, why = -1, ""
        try:
            while (ended := self._play(tape.address, contract, timeout_ns, noted, _LAST_LOOK * (gone >= 0))) != _DONE:
                at = tape.words[Tape.FAULT_LINK]
                link = self._links[at]
                if ended == _MISMATCH:
                    expected, got = (tape.words[word] // tape.element for word in (Tape.EXPECTED, Tape.GOT))
                    raise Fault(FaultKind.MISMATCH, link.rank, f"expected {expected} elements, got {got}")
                if ended == _LATE:
                    raise Fault(FaultKind.TIMEOUT, link.rank, "deadline passed")
                self._check()
                if not tape.words[Tape.PLAYING]:
                    continue
                if at == gone:  # what it wrote before it went was looked for again
                    raise Fault(FaultKind.PEER, link.rank, why)
                said = self._left(link)
                gone, why = (-1, "") if said is None else (at, said)
        except BaseException:
            self.drop(tape)
            raise

    def drop(self, tape: Tape) -> None:
        """As `base.Player` says."""
        assert native.player is not None, "it made this player"
        native.player.drop(tape.address)
