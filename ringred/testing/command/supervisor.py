"""Starts the ranks of a job on this host, and others in the place of those that fail."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from ringred.testing.command.spare import Spares

__all__ = ["Supervisor", "Tell", "say_facts", "say_it"]

Tell: TypeAlias = "Callable[[str, Mapping[str, Any]], None]"
"""Takes a sentence on what happened, and the same as facts."""

_LOOK_SECONDS = 0.02  # between two looks at the ranks
_GRACE_SECONDS = 1.0  # after a failure, to see whether the other ranks fail too
_PATIENCE_SECONDS = 10.0  # for ranks to end by themselves once they were asked
_LAST_LINES = 60  # of a rank's errors that are repeated at the end
_MEMBERS_SECONDS = 0.25  # between two looks at who is in the job
_SETTLED_SECONDS = 30.0  # after which a process that fails is taken for one that was of use
_LONGEST_LINE = 1 << 14
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class _Rank:
    """One process. What it writes to stderr is passed on, and the end of it kept."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], joins: bool) -> None:
        self.number, self.process, self.joins = number, process, joins
        self.said: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._reader = threading.Thread(target=self._pass_on, name=f"ringred-rank-{number}", daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self.process.stderr is not None, "it is a pipe"
        rest = b""
        while part := os.read(self.process.stderr.fileno(), 1 << 16):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it: the rank must not wait for that
                sys.stderr.buffer.write(part)
                sys.stderr.flush()
            *lines, rest = (rest + part).replace(b"\r", b"\n").split(b"\n")
            self.said.extend(lines)
            rest = rest[-_LONGEST_LINE:]
        if rest:
            self.said.append(rest)

    def ended(self) -> int | None:
        """Its exit status, negative for a signal, once it has ended and all that it said was passed on."""
        status = self.process.poll()
        if status is not None:
            self._reader.join(1.0)
        return status

    def complains(self) -> bool:
        """Whether it failed because of another rank."""
        last = self.said[-1] if self.said else b""
        return b"PeerFailed" in last or b"CollectiveTimeout" in last

    def traceback(self) -> str:
        """The last traceback that it wrote, or its last lines."""
        lines = [line.decode(errors="replace") for line in self.said]
        starts = [at for at, line in enumerate(lines) if line.startswith("Traceback ")]
        return "\n".join(lines[starts[-1] :] if starts else lines[-10:])


class Supervisor:
    """Runs `command` as `ranks` processes, numbered from `first` on, of a job of `size`. A process in the place of one
    that failed joins the others; after `restarts` of them that failed in a row, no more are started. `spares` processes
    are ready for that, once all ranks are there; then `command` is Python with a script. `members` gives the processes
    of this host that are in it by now, or None before all have come together. If the job is at work already, this host
    `joins` it: its first processes too. What happens is told to `tell`: a sentence, and facts."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        first: int,
        ranks: int,
        size: int,
        restarts: int,
        members: Callable[[], Collection[int] | None],
        joins: bool = False,
        tell: Tell | None = None,
        spares: int = 0,
    ) -> None:
        self._tell = tell or say_it
        self._command, self._environment = list(command), dict(environment)
        self._spares = Spares(spares, self._command[1:], self._environment, _end_with_parent, self._tell)
        self._first, self._ranks, self._size, self._restarts = first, ranks, size, restarts
        self._members, self._let_in = members, set[int]()
        self._in_since: dict[int, float] = {}  # when a process was first seen to be let in
        self._since: dict[int, float] = {}  # and to be left out
        self._join_from_the_start = joins
        self._running: list[_Rank] = []
        self._failed: list[tuple[_Rank, int]] = []
        self._vacant: list[int] = []  # the numbers of ranks that are to be replaced
        self._in_vain = 0  # processes that failed one after the other
        self._done = False  # whether some rank has come to its end
        self._spoiled = False  # whether one failed by itself when others were done
        self._stopping: int | None = None

    def run(self) -> int:
        """Returns once all ranks have ended: 0 if the job was done, else the status of the first that failed."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in range(self._first, self._first + self._ranks):
                self._start(number, self._join_from_the_start)
            return self._watch()
        finally:
            self._end_all()
            for signal_number, handler in before.items():
                signal.signal(signal_number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = number

    def _start(self, number: int, joins: bool) -> bool:
        """Starts a rank; whether a spare process does it."""
        local = number - self._first
        variables = {
            "RANK": str(number),
            "WORLD_SIZE": str(self._size),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(self._ranks),
            "RINGRED_JOINS": "1" if joins else "0",
        }
        spare = self._spares.take(variables) if joins else None
        process = spare or subprocess.Popen(
            self._command,
            env={**self._environment, **variables},
            stderr=subprocess.PIPE,
            preexec_fn=_end_with_parent,
        )
        started = _Rank(number, process, joins)
        self._running.append(started)
        self._let_in.discard(started.process.pid)  # numbers of processes come again
        self._since.pop(started.process.pid, None)
        return spare is not None

    def _watch(self) -> int:
        looked = 0.0
        while self._running and self._stopping is None:
            time.sleep(_LOOK_SECONDS)
            ended = self._reap()
            self._done = self._done or any(status == 0 for _, status in ended)
            if ended or time.monotonic() - looked > _MEMBERS_SECONDS:
                looked = time.monotonic()
                self._look()
            for rank, status in ended:
                self._note(rank, status)
            if self._vacant and not self._done and self._nobody_is_left():
                return self._give_up()
            if self._done:
                if all(rank.joins and rank.process.pid not in self._let_in for rank in self._running):
                    break  # those that wait to join have nothing to do
            else:
                self._replace()
        if self._stopping is not None:
            return 128 + self._stopping
        return self._give_up() if self._failed and (self._spoiled or not self._done) else 0

    def _note(self, rank: _Rank, status: int) -> None:
        """What follows from the end of a process."""
        was_in = rank.process.pid in self._let_in
        if status == 0 or (self._done and not was_in):
            return
        self._failed.append((rank, status))
        self._spoiled = self._spoiled or (self._done and status > 0)
        # A process that fails by itself soon after it was let in is no better than one that never was.
        lived = time.monotonic() - self._in_since.get(rank.process.pid, math.inf) > _SETTLED_SECONDS or status < 0
        self._in_vain = 0 if was_in and lived else self._in_vain + 1
        self._vacant.append(rank.number)

    def _replace(self) -> None:
        """Starts a process in each place that is vacant, unless too many of them failed."""
        if self._in_vain > self._restarts:
            if self._vacant:
                number = self._vacant[-1]
                text = f"{self._in_vain} processes failed one after the other: rank {number} is not replaced"
                self._tell(text, {"event": "not replaced", "rank": number, "failed": self._in_vain})
            self._vacant.clear()
            return
        for number in self._vacant:
            status = next(status for rank, status in reversed(self._failed) if rank.number == number)
            spare = self._start(number, joins=True)
            text = f"rank {number} {_how(status)}; {'a spare' if spare else 'another'} process takes its place"
            self._tell(text, {"event": "replaced", "rank": number, "status": status, "spare": spare})
        self._vacant.clear()

    def _look(self) -> None:
        """Who has been let in; and ends those whom the others went on without: they are stopped, or hang."""
        now = self._members()
        fresh = set(now or ()) - self._let_in
        self._in_since.update(dict.fromkeys(fresh, time.monotonic()))
        if fresh and self._let_in:
            self._failed = self._failed[-1:]  # the failures before were got over
        self._let_in |= fresh
        for rank in self._running:
            left_out = now is not None and rank.process.pid in self._let_in and rank.process.pid not in now
            since = self._since.setdefault(rank.process.pid, time.monotonic()) if left_out else time.monotonic()
            if time.monotonic() > since + _GRACE_SECONDS:
                rank.process.kill()
        # What a spare imports would hold up those that have yet to come.
        if self._running and not self._done and self._let_in.issuperset(rank.process.pid for rank in self._running):
            self._spares.keep()

    def _reap(self) -> list[tuple[_Rank, int]]:
        ended = [(rank, status) for rank in self._running if (status := rank.ended()) is not None]
        for rank, _ in ended:
            self._running.remove(rank)
        return ended

    def _nobody_is_left(self) -> bool:
        """Whether nobody is there whom another process could join: all ranks make the same error, for example, or one
        failed before all had come together."""
        if not self._let_in:
            return True
        if self._size > self._ranks:  # there may be others on other hosts
            return False
        until = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < until:
            if not any(rank.process.poll() is None and rank.process.pid in self._let_in for rank in self._running):
                ended = self._reap()
                self._failed += [(rank, status) for rank, status in ended if status]
                self._done = any(status == 0 for _, status in ended)
                return not self._done
            time.sleep(_LOOK_SECONDS)
        return False

    def _give_up(self) -> int:
        self._end_all()
        # What a rank says by itself is the cause, rather than that another one was ended.
        causes = [one for one in self._failed if one[1] > 0 and not one[0].complains()]
        rank, status = causes[0] if causes else next((one for one in self._failed if one[1] > 0), self._failed[0])
        among = f", one of {len(self._failed)} that failed" if len(self._failed) > 1 else ""
        facts = {"event": "given up", "rank": rank.number, "status": status, "failed": len(self._failed)}
        self._tell(f"rank {rank.number} {_how(status)}{among}:\n{rank.traceback()}", facts)
        return status if status > 0 else 128 - status

    def _end_all(self) -> None:
        self._spares.end()
        for how, patience in ((signal.SIGTERM, _PATIENCE_SECONDS), (signal.SIGKILL, _PATIENCE_SECONDS)):
            for rank in self._running:
                if rank.process.poll() is None:
                    rank.process.send_signal(how)
            until = time.monotonic() + patience
            while self._running and time.monotonic() < until:
                self._reap()
                time.sleep(_LOOK_SECONDS)


def say_it(text: str, facts: Mapping[str, Any]) -> None:
    """Says it on stderr, as a line for people."""
    with contextlib.suppress(OSError, ValueError):
        print(f"ringred run: {text}", file=sys.stderr, flush=True)


def say_facts(text: str, facts: Mapping[str, Any]) -> None:
    """Says it on stderr, as a line of JSON."""
    with contextlib.suppress(OSError, ValueError):
        print(json.dumps({"ringred": "run", **facts, "text": text}), file=sys.stderr, flush=True)


def _how(status: int) -> str:
    if status >= 0:
        return f"failed with status {status}"
    return f"was ended by {signal.Signals(-status).name}"


def _end_with_parent() -> None:
    """Of a rank: it ends when its supervisor does."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
