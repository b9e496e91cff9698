"""A member of a job: what it tells others that ask, while its program does what it does."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

from ringred.transports.membership.board import Board
from ringred.transports.membership.caller import Connection
from ringred.transports.membership.card import Card, place
from ringred.transports.membership.listener import Listener
from ringred.transports.membership.view import View

__all__ = ["Coming", "Member"]

_Held: TypeAlias = "concurrent.futures.Future[dict[str, Any]]"
_numbers = itertools.count()


class Coming(NamedTuple):
    """Who has come to agree on the next view, or to join: what it says, and where it gets the answer."""

    card: Card
    said: dict[str, Any]
    answer: _Held


class Member:
    """This rank, as the others of its job reach it, from any thread. `host` is the address at which other hosts do,
    by `port` or any; None where there are none. `describe` tells what the rank is doing; anybody of this user may ask
    for that.

    Raises `TransportUnavailable`."""

    def __init__(self, secret: bytes, host: str | None = None, port: int = 0) -> None:
        self.secret = secret
        self.identity = secrets.token_hex(8)
        self.describe: Callable[[], dict[str, Any]] = dict
        self.everyone: Callable[[], dict[str, Any]] = dict  # asks all members, which takes a while
        self.facts: dict[str, Any] = {}  # what the program tells of itself, as JSON
        self.news = threading.Condition()
        """Notified when somebody comes or goes."""
        self._views: dict[str, View] = {}
        self._earlier: dict[tuple[str, int], View] = {}
        self._coming: dict[tuple[str, int], dict[str, Coming]] = {}
        self._joining: dict[str, dict[str, Coming]] = {}
        self._boards: dict[str, Board] = {}
        self._agreeing: set[tuple[str, int]] = set()
        self._left: dict[str, int] = {}
        self._users = 0
        self.reached: set[str] = set()
        """The identities of members of other hosts that were reached at their address."""
        self.approved: Callable[[View], View] = lambda view: view
        """The view that counts where this member decided one: asked before others hear of it."""
        name = f"ringred-{os.getpid()}-{next(_numbers)}-{secrets.token_hex(4)}"
        self._listener = Listener(secret, self._answer, name, host, port)
        self.card = Card(self.identity, os.getpid(), place(), name, host or "", self._listener.port)

    # ------------------------------------------------------------------ what it knows

    def view(self, lineage: str) -> View | None:
        """The newest view of a communicator."""
        return self._views.get(lineage)

    def known(self, lineage: str, generation: int) -> View:
        """A view that this member has adopted."""
        return self._earlier[lineage, generation]

    def adopt(self, view: View) -> View:
        """From here on `view` is what others hear, unless one of its generation is known: that one counts, and is
        returned."""
        with self.news:
            known = self._earlier.setdefault((view.lineage, view.generation), view)
            newest = self._views.get(view.lineage)
            if newest is None or newest.generation < view.generation:
                self._views[view.lineage] = known
            for coming in self._coming.pop((view.lineage, view.generation - 1), {}).values():
                _give(coming.answer, {"view": known.as_fields()})
            for identity, joining in list(self._joining.get(view.lineage, {}).items()):
                if known.rank_of(identity) is not None:
                    del self._joining[view.lineage][identity]
                    _give(joining.answer, {"view": known.as_fields()})
            self._boards = {key: board for key, board in self._boards.items() if self._recent(key)}
        return known

    def successor(self, view: View) -> View | None:
        """The view that came after `view`, if it is known."""
        return self._earlier.get((view.lineage, view.generation + 1))

    def come(self, view: View) -> dict[str, Coming]:
        """Those who have come to this member to agree on what follows `view`, by identity."""
        return dict(self._coming.get((view.lineage, view.generation), {}))

    def turn_away(self, view: View, why: str) -> None:
        """Tells them that there is no next view."""
        with self.news:
            for coming in self._coming.pop((view.lineage, view.generation), {}).values():
                _give(coming.answer, {"refused": why})

    @contextmanager
    def agreeing(self, view: View) -> Iterator[None]:
        """Within it, this member tells that it agrees on what follows `view`."""
        self._left.pop(view.lineage, None)
        self._agreeing.add((view.lineage, view.generation))
        try:
            yield
        finally:
            self._agreeing.discard((view.lineage, view.generation))

    def leave(self, view: View) -> None:
        """Takes no further part in a communicator, as it is in this view."""
        self._left[view.lineage] = max(view.generation, self._left.get(view.lineage, -1))

    def joining(self, lineage: str) -> dict[str, Coming]:
        """Those who wait to be let in, by identity."""
        return dict(self._joining.get(lineage, {}))

    def _recent(self, key: str) -> bool:
        lineage, _, generation = key.rpartition("~")
        newest = self._views.get(lineage)
        return newest is None or int(generation.partition(".")[0]) >= newest.generation - 1

    # ------------------------------------------------------------------ what it answers

    def _answer(self, message: dict[str, Any], trusted: bool) -> dict[str, Any] | _Held:
        try:
            do = message.get("do")
            if do == "describe":
                return self.describe()
            if do == "everyone":
                return _in_thread(self.everyone)
            if not trusted:
                return {"refused": "that is for processes of the job"}
            if do == "ping":
                return self._pinged(str(message["lineage"]), int(message["generation"]))
            if do == "come":
                return self._came(message)
            if do == "join":
                return self._asked_in(message)
            if do == "board":
                return self._pinned(message)
        except Exception as failure:  # whoever sent it; the next one is answered all the same
            return {"refused": f"{failure!r}"}
        return {"refused": f"it does not know {do!r}"}

    def _pinged(self, lineage: str, generation: int) -> dict[str, Any]:
        view = self._earlier.get((lineage, generation + 1))
        return {
            "identity": self.identity,
            "left": self._left.get(lineage, -1) >= generation,
            "agrees": (lineage, generation) in self._agreeing,
            "view": None if view is None else view.as_fields(),
        }

    def _came(self, message: dict[str, Any]) -> dict[str, Any] | _Held:
        lineage, generation = str(message["lineage"]), int(message["generation"])
        coming = Coming(Card.from_text(message["card"]), dict(message["said"]), concurrent.futures.Future())
        with self.news:
            view = self._earlier.get((lineage, generation + 1))
            if view is not None:
                return {"view": view.as_fields()}
            self._hold(self._coming.setdefault((lineage, generation), {}), coming)
        return coming.answer

    def _asked_in(self, message: dict[str, Any]) -> dict[str, Any] | _Held:
        lineage = str(message["lineage"])
        coming = Coming(Card.from_text(message["card"]), dict(message["said"]), concurrent.futures.Future())
        with self.news:
            view = self._views.get(lineage)
            if view is None:
                return {"refused": f"no part of {lineage}"}
            if view.members[0].identity != self.identity:
                return {"go": view.members[0].as_text(), "generation": view.generation}
            self._hold(self._joining.setdefault(lineage, {}), coming)
        return coming.answer

    def _hold(self, held: dict[str, Coming], coming: Coming) -> None:
        identity = coming.card.identity
        held[identity] = coming

        def let_go(answer: _Held) -> None:
            with self.news:
                if answer.cancelled() and held.get(identity) is coming:
                    del held[identity]
                self.news.notify_all()

        coming.answer.add_done_callback(let_go)
        self.news.notify_all()

    def _pinned(self, message: dict[str, Any]) -> dict[str, Any] | _Held:
        board = self._boards.setdefault(str(message["board"]), Board())
        if "advance" in message and not board.advance(f"generation of {message['advance']}", int(message["number"])):
            return {"advanced": False, "view": board.now([message["advance"]])[message["advance"]]}
        for name, value in dict(message.get("put", {})).items():
            board.put(str(name), str(value))
        if "advance" in message:
            return {"advanced": True}
        if "add" in message:
            return {"total": board.add(str(message["add"]), int(message["number"]))}
        if "wait" in message:
            return board.once_there([str(name) for name in message["wait"]])
        return board.now([str(name) for name in message.get("look", ())])

    # ------------------------------------------------------------------ calling others

    def call(self, card: Card, timeout: float) -> Connection:
        """A connection to another member. Raises as `Connection`."""
        return Connection(card, self.secret, timeout)

    def wait(self) -> None:
        """Does nothing else, for ever."""
        with self.news:
            while True:
                self.news.wait()

    def hold(self) -> None:
        """Has one user more."""
        with self.news:
            self._users += 1

    def let_go(self) -> None:
        """Has one user less; after the last it is reached no more."""
        with self.news:
            self._users -= 1
            last = not self._users
        if last:
            self.close()

    def close(self) -> None:
        """Is reached no more."""
        self._listener.close()


def _give(answer: _Held, what: dict[str, Any]) -> None:
    if answer.set_running_or_notify_cancel():
        answer.set_result(what)


def _in_thread(work: Callable[[], dict[str, Any]]) -> _Held:
    answer: _Held = concurrent.futures.Future()

    def run() -> None:
        try:
            made = work()
        except Exception as failure:  # who asked hears of it
            made = {"refused": f"{type(failure).__name__}: {failure}"}
        _give(answer, made)

    threading.Thread(target=run, name="ringred-asking", daemon=True).start()
    return answer
