"""Plays tapes over `shm` by the compiled player, which works on the same words as shm.py and shm_sending.py."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence

from ringred import native
from ringred.transports.base import Fault, FaultKind, Tape
from ringred.transports.links import LAYOUT, LOST, Link, State
from ringred.transports.shm_sending import Sender

__all__ = ["ShmPlayer", "usable"]

_DONE, _LOOK, _LATE, _MISMATCH = range(4)
_FAULT_LINK, _EXPECTED, _GOT = Tape.HEAD - 3, Tape.HEAD - 2, Tape.HEAD - 1
_play = None if native.player is None else native.player.play


def usable() -> str | None:
    """Why plans are not played by the compiled player, or None if they are."""
    if native.player is None:
        return native.reason
    if native.player.layout() != LAYOUT:
        return "it was built for another version of ringred; install ringred again"
    return None


class ShmPlayer:
    """The player of a transport with this `state` and these `links`, in the order of their words.

    `check_aborted` raises if a rank has aborted; `left` says why a peer is gone, or None.
    """

    def __init__(
        self,
        state: State,
        links: Sequence[Link],
        sender: Sender,
        check_aborted: Callable[[], None],
        left: Callable[[Link], str | None],
    ) -> None:
        self._state, self._links, self._sender = state, list(links), sender
        self._check_aborted, self._left = check_aborted, left
        self.links: Mapping[int, int] = {link.rank: number for number, link in enumerate(links)}

    def ready(self) -> bool:
        """Whether no send waits for room and no receive is pending."""
        return not self._sender.queued and not any(link.pending for link in self._links)

    def play(self, tape: Tape, deadline: float, times: array[int] | None) -> None:
        """As `base.Player` says."""
        assert _play is not None, "a player is only made where there is one"
        until, noted = int(deadline * 1e9), 0 if times is None else times.buffer_info()[0]
        gone, why = -1, ""
        while True:
            try:
                ended = _play(self._state.address, tape.address, until, noted, gone >= 0)
            except BaseException:
                self._drop(tape)
                raise
            if ended == _DONE:
                break
            at = tape.words[_FAULT_LINK]
            link = self._links[at]
            try:
                if ended == _MISMATCH:
                    expected, got = (tape.words[word] // tape.element for word in (_EXPECTED, _GOT))
                    raise Fault(FaultKind.MISMATCH, link.rank, f"expected {expected} elements, got {got}")
                if ended == _LATE:
                    raise Fault(FaultKind.TIMEOUT, link.rank, "deadline passed")
                if at == gone:  # what it wrote before it went was looked for again
                    raise Fault(FaultKind.PEER, link.rank, why)
                self._state.own[LOST] = 0
                self._check_aborted()
                said = self._left(link)
                gone, why = (-1, "") if said is None else (at, said)
            except Fault:
                self._drop(tape)
                raise
        counters = self._sender.counters
        sent, bytes_sent, received, bytes_received = tape.moved
        counters.messages_sent += sent
        counters.bytes_sent += bytes_sent
        counters.messages_received += received
        counters.bytes_received += bytes_received

    def _drop(self, tape: Tape) -> None:
        assert native.player is not None
        native.player.drop(tape.address)
