"""What a DistributedDataParallel does when its ranks change, as a party of `Recovery`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ringred.communicator import Communicator
from ringred.data_parallel.recovery import Change, Recovery
from ringred.data_parallel.reducer import Reducer
from ringred.data_parallel.weights import Weights

__all__ = ["GoingOn", "next_name"]

_wrappers: weakref.WeakKeyDictionary[Communicator, int] = weakref.WeakKeyDictionary()


def next_name(comm: Communicator) -> str:
    """What distinguishes the next model on `comm` from those before it."""
    number = _wrappers[comm] = _wrappers.get(comm, 0) + 1
    return f" of model {number}" if number > 1 else ""


class GoingOn:
    """The part of a DistributedDataParallel that goes on over other ranks. `recovery` is None if it does not."""

    comm: Communicator
    reducer: Reducer
    recovery: Recovery | None
    _weights: Weights
    _all_begun = True
    _forwards: int
    _sync_buffers_next: bool

    @property
    def steps(self) -> int:
        """The backwards that all ranks have finished."""
        return self.reducer.steps

    def _begin_with_those_left(self, recovery: Recovery, begin: Callable[[], None]) -> None:
        """Calls `begin`, which makes a new reducer over `comm`, until it succeeds on all ranks that are left."""

        def begun_by_all() -> None:
            vars(self).pop("reducer", None)
            self._move_to(recovery.comm)
            begin()
            self.comm.barrier()  # who is through knows that all have begun

        recovery.enrol(self)
        try:
            recovery.through(begun_by_all)
        except BaseException:
            recovery.withdraw(self)
            raise

    def _move_to(self, comm: Communicator) -> None:
        _wrappers[comm] = max(_wrappers.get(comm, 0), _wrappers.get(self.comm, 0))
        self.comm = comm

    def tells(self) -> bool:
        """Whether it has begun."""
        return "reducer" in vars(self)

    def follow(self, change: Change) -> None:
        """Notes whether all have begun: else none is through with that, and all begin anew."""
        self._all_begun = False not in change.told

    def adopt(self, comm: Communicator) -> None:
        """Goes on over `comm`. Collective."""
        self._move_to(comm)
        if self._all_begun:
            self._weights.comm = comm
            self.reducer.adopt(comm)

    def handed_over(self) -> dict[str, Any]:
        """How far it has come, for a rank that joins."""
        copies = self._sync_buffers_next
        return {"forwards": self._forwards, "copies": copies, "reducer": self.reducer.progress()}

    def take_over(self, state: dict[str, Any]) -> None:
        """Goes on as a rank that has joined."""
        self._forwards, self._sync_buffers_next = state["forwards"], state["copies"]
        self.reducer.resume(state["reducer"])
