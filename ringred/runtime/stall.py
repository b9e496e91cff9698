"""Says who is missing while there is still time: one line for a collective that takes long, well before its timeout."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from ringred.errors import PeerFailed
from ringred.runtime import lifetime
from ringred.runtime.seat import check_alive
from ringred.runtime.status import ENDED, Observed, Waits, ask_all, call_of, describe, in_short

__all__ = ["verdict", "watch"]

_LOOKS = 10  # in the time after which a wait is told of
_LONGEST_PAUSE = 0.5  # seconds between two looks
_NAMED = 8  # ranks that are named at most

_waits = Waits()
_starting = threading.Lock()
_thread: threading.Thread | None = None
_watched: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
_told: weakref.WeakKeyDictionary[Any, object] = weakref.WeakKeyDictionary()


_blind: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()  # when each was probed last
_PROBE_SECONDS = 1.0


def watch(comm: Any, seconds: float) -> None:
    """From here on others can ask what `comm` does, and its waits longer than `seconds` are told of; 0: none are."""
    global _thread
    member = comm.seat.member
    reference = weakref.ref(member)
    member.describe = lambda: describe(_there(reference), _comms(), _waits)
    member.everyone = lambda: _everyone(_there(reference))
    blind = getattr(comm.transport, "far", comm.transport).name == "mpi"
    if not (seconds or blind):
        return
    with _starting:
        _watched[comm] = seconds
        if blind:
            _blind[comm] = 0.0
        if _thread is None:
            _thread = threading.Thread(target=_look, name="ringred-watch", daemon=True)
            _thread.start()


def _there(reference: weakref.ref[Any]) -> Any:
    member = reference()
    assert member is not None, "it is asked for what it does"
    return member


def _comms() -> list[Any]:
    live: list[Any] = list(lifetime.live)
    return [comm for comm in live if getattr(comm, "seat", None) is not None and not comm.closed]


def _everyone(member: Any) -> dict[str, Any]:
    """What all ranks of the job do."""
    mine = [comm for comm in _comms() if comm.seat.member is member]
    widest = max(mine, key=lambda comm: comm.size)
    return {"communicator": widest.name, "ranks": ask_all(member, widest.seat.view)}


def _look() -> None:
    pause = _LONGEST_PAUSE
    while not _pause.wait(pause):
        pause = _look_once(pause)


def _end(limit: float) -> None:
    _pause.set()
    if _thread is not None:
        _thread.join(limit)


def _look_once(pause: float) -> float:
    """Looks, `pause` seconds after the last time, and returns when to look next."""
    with _starting:
        watched = {comm: seconds for comm, seconds in list(_watched.items()) if not comm.closed}
    _waits.look(watched)
    for comm in watched:
        if comm in _blind:
            _probe(comm)
    watched = {comm: seconds for comm, seconds in watched.items() if seconds}
    for comm, seconds in watched.items():
        call, _, under_way = comm.runner.doings.seen()
        if (
            under_way
            and _waits.of(comm, call) >= seconds - min(2 * pause, seconds / _LOOKS)
            and _told.get(comm) != call
        ):
            _told[comm] = call
            _tell(comm, call)
    return min([_LONGEST_PAUSE, *(seconds / _LOOKS for seconds in watched.values())])


def _probe(comm: Any) -> None:
    """Where the transport does not notice that a peer has ended, as MPI does not: looks whether all that a call waits
    for are there, once a second, and ends it if not."""
    call, _, under_way = comm.runner.doings.seen()
    now = time.monotonic()
    if under_way and _waits.of(comm, call) >= _PROBE_SECONDS and now - _blind[comm] >= _PROBE_SECONDS:
        _blind[comm] = now
        try:
            check_alive(comm.seat.member, comm.seat.view)
        except PeerFailed as failure:
            comm.abort(failure)


def _tell(comm: Any, call: object) -> None:
    line = verdict(comm, call, ask_all(comm.seat.member, comm.seat.view))
    if line is not None:
        comm.stalls += 1
        print(f"ringred: {line}", file=sys.stderr, flush=True)


def verdict(comm: Observed, call: object, told: Sequence[dict[str, Any]]) -> str | None:
    """Who is missing from `call` of `comm`, by what each rank has told. None if it is over, or if a lower rank waits in
    it and says so itself."""
    assert comm.seat is not None, "only who is reached by others asks them"
    lineage, generation = comm.seat.view.lineage, comm.seat.view.generation
    current, doing, under_way = comm.runner.doings.seen()
    if current != call or not under_way:
        return None
    there = [call_of(one, lineage, generation) for one in told]
    waiting = [r for r, one in enumerate(there) if one and one["under_way"] and one["number"] == doing.number]
    if waiting and waiting[0] < comm.rank:
        return None
    missing = [rank for rank in range(comm.size) if rank not in waiting and rank != comm.rank]
    head = f"rank {comm.rank} has waited {_waits.of(comm, call):.0f} s in {doing.text} at {doing.site}"
    if not missing:
        return f"{head}; no rank is missing: all are in it, and data moves slowly or not at all"
    parts = []
    for rank in missing[:_NAMED]:
        state = "is missing" if told[rank].get("silent", ENDED) == ENDED else "may be missing"
        parts.append(f"rank {rank} {state}: {in_short(told[rank], lineage, generation)}")
    if len(missing) > _NAMED:
        parts.append(f"{len(missing) - _NAMED} more are missing")
    return f"{head}; {'; '.join(parts)}"


_pause = threading.Event()


def _forget() -> None:
    """In a forked child, which is no rank."""
    global _thread, _starting, _pause
    _thread, _starting, _pause = None, threading.Lock(), threading.Event()
    _watched.clear()


os.register_at_fork(after_in_child=_forget)
lifetime.afterwards.append(_end)
