"""What the ranks of a job are doing: each answers for itself, from a thread of its own, whatever its program does."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from ringred.runtime.call_site import in_libraries
from ringred.runtime.doing import Doings
from ringred.runtime.seat import Seat
from ringred.topology.detect import host_name
from ringred.transports.membership.caller import Cut, Gone, Silent
from ringred.transports.membership.card import Card
from ringred.transports.membership.member import Member
from ringred.transports.membership.view import View
from ringred.transports.membership.wire import Malformed

__all__ = ["ENDED", "Observed", "ask_all", "describe", "in_short"]

ENDED = "it has ended"
"""Why a rank is silent that will not come again."""
_ANSWER_SECONDS = 1.0
_CALLS = 32  # at once
_FRAMES = 12  # of a stack


class Runs(Protocol):
    """A runner, as this module sees one."""

    doings: Doings


class Observed(Protocol):
    """A communicator, as this module sees one."""

    rank: int
    size: int
    name: str
    seat: Seat | None
    thread: int
    """The thread that made it, whose stack says what the program does."""

    @property
    def runner(self) -> Runs:
        """What runs its calls."""


class Waits:
    """Since when each communicator of this process has been in its call, as far as `look` has seen."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[object, float]] = {}
        self._lock = threading.Lock()

    def look(self, comms: Iterable[Observed]) -> None:
        """Looks once more."""
        now = time.monotonic()
        with self._lock:
            before, self._since = self._since, {}
            for comm in comms:
                call, _, under_way = comm.runner.doings.seen()
                if under_way:
                    known = before.get(id(comm))
                    same = known is not None and known[0] == call
                    self._since[id(comm)] = known if same and known is not None else (call, now)

    def of(self, comm: Observed, call: object) -> float:
        """The seconds that `call` of `comm` has taken."""
        with self._lock:
            known = self._since.get(id(comm))
        return time.monotonic() - known[1] if known is not None and known[0] == call else 0.0


def describe(member: Member, comms: Iterable[Observed], waits: Waits) -> dict[str, Any]:
    """What this rank does, as JSON: the calls of its communicators, and where its program is."""
    mine = [comm for comm in comms if comm.seat is not None and comm.seat.member is member]
    calls = []
    for comm in mine:
        assert comm.seat is not None, "those without are left out"
        call, doing, under_way = comm.runner.doings.seen()
        calls.append(
            {
                "communicator": comm.name,
                "lineage": comm.seat.view.lineage,
                "generation": comm.seat.view.generation,
                "rank": comm.rank,
                "size": comm.size,
                "number": doing.number,
                "call": doing.text,
                "site": doing.site,
                "under_way": under_way,
                "seconds": round(waits.of(comm, call), 3),
            }
        )
    thread = mine[0].thread if mine else threading.main_thread().ident
    stack = _stack(sys._current_frames().get(thread or 0))
    return {"process": os.getpid(), "host": host_name(), **member.facts, "calls": calls, "stack": stack}


def _stack(frame: Any) -> list[str]:
    """The innermost frames of a thread, those of libraries left out unless there are no others."""
    if frame is None:
        return []
    entries = traceback.extract_stack(frame)
    shown = [entry for entry in entries if not in_libraries(entry.filename)] or list(entries)
    return [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in reversed(shown[-_FRAMES:])]


def ask_all(member: Member, view: View) -> list[dict[str, Any]]:
    """What each member of `view` answers, by rank, or why it does not: {"silent": ...}."""
    with ThreadPoolExecutor(_CALLS, thread_name_prefix="ringred-ask") as calls:
        try:
            answers = [calls.submit(_asked, member, card) for card in view.members]
        except RuntimeError:  # no thread starts any more: the interpreter ends
            return [_asked(member, card) for card in view.members]
        return [answer.result() for answer in answers]


def _asked(member: Member, card: Card) -> dict[str, Any]:
    if card.identity == member.identity:
        return member.describe()
    try:
        with member.call(card, _ANSWER_SECONDS) as connection:
            return connection.ask({"do": "describe"}, _ANSWER_SECONDS)
    except (Gone, Malformed):
        return {"process": card.process, "silent": ENDED}
    except (Silent, Cut):
        return {"process": card.process, "silent": _why_silent(card)}


def _why_silent(card: Card) -> str:
    if not card.is_here():
        unreached = (
            "it cannot be asked: it listens on its own host only (RINGRED_INTERFACE names an address for others)"
        )
        return "it does not answer: stopped, or its host is cut off" if card.port else unreached
    try:
        state = Path(f"/proc/{card.process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "it does not answer"
    return {
        "T": "it is stopped (SIGSTOP)",
        "t": "it is stopped by a debugger",
        "Z": ENDED,
    }.get(state, "it does not answer: its code keeps Python from running")


def in_short(told: Mapping[str, Any], lineage: str, generation: int) -> str:
    """One rank's answer in a few words, for a communicator."""
    if "silent" in told:
        return f"{told['silent']} (process {told['process']})"
    who = f"process {told['process']} on {told['host']}"
    place = f", at {told['stack'][0]}" if told["stack"] else ""
    call = call_of(told, lineage, generation)
    if call is None:
        return f"it has left that communicator{place} ({who})"
    if call["under_way"]:
        return f"it is in {call['call']} at {call['site']} ({who})"
    last = f"its last collective was {call['call']}" if call["number"] else "it has called no collective yet"
    return f"{last}{place} ({who})"


def call_of(told: Mapping[str, Any], lineage: str, generation: int) -> Mapping[str, Any] | None:
    """What a rank does on one communicator."""
    calls: list[dict[str, Any]] = told.get("calls", [])
    return next((c for c in calls if (c["lineage"], c["generation"]) == (lineage, generation)), None)
