"""The exceptions of ringred. Every message says which rank failed, where, what was expected and what was found.

`RingredError` is the base class; each exception also derives from the matching built-in type, so that a program
that already catches `ValueError` or `TimeoutError` keeps working.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

__all__ = [
    "CollectiveMismatch",
    "CollectiveTimeout",
    "DeadlockError",
    "GridError",
    "ModelMismatch",
    "NonFiniteGradient",
    "OverwriteError",
    "PeerFailed",
    "PolicyError",
    "ReplicasDiverged",
    "RingredError",
    "ScheduleError",
    "TooFewWorkers",
    "TransportUnavailable",
    "UnknownAlgorithm",
    "UnsupportedTensor",
    "nearest",
]


def nearest(name: str, names: Iterable[str]) -> str:
    """What a message about an unknown `name` says of the known one that it is like, as in " (did you mean 'ring'?)"."""
    like = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {like[0]!r}?)" if like else ""


class RingredError(RuntimeError):
    """Base class of all exceptions that ringred raises on purpose; a RuntimeError, like torch's own for collectives.

    A traceback ends with the command that tells what each message means, and what to do (from Python 3.11 on)."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        if sys.version_info >= (3, 11):
            # One of a program's own is told as what it is.
            kind = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("ringred."))
            self.add_note(f"What it means, and what to do: ringred help {kind.__name__}")


class CollectiveMismatch(RingredError):
    """The ranks of one communicator did not call the same collective with the same arguments."""


class CollectiveTimeout(RingredError, TimeoutError):
    """A peer did not take part in a collective before its deadline."""


class PeerFailed(RingredError, ConnectionError):
    """A peer died, raised an exception or abandoned the collective; this communicator can no longer be used."""


class ModelMismatch(RingredError):
    """The ranks built different models."""


class ReplicasDiverged(RingredError):
    """Ranks that must hold the same parameters hold different ones."""


class NonFiniteGradient(RingredError, ArithmeticError):
    """A gradient of some rank holds NaN or infinity; it was not reduced."""


class UnknownAlgorithm(RingredError, ValueError):
    """No algorithm of that name is registered for the collective."""


class GridError(RingredError, ValueError):
    """The grid does not fit the number of ranks or the algorithm."""


class UnsupportedTensor(RingredError, TypeError):
    """The tensor's layout, device or dtype cannot take part in this collective."""


class TransportUnavailable(RingredError):
    """A transport cannot be set up here; the message says how to fix it."""


class PolicyError(RingredError, ValueError):
    """A parameter server's policy is unknown, or was told what cannot have happened."""


class TooFewWorkers(RingredError):
    """The parameter server's policy waits for more workers than there are."""


class ScheduleError(RingredError, AssertionError):
    """A schedule is wrong: the verifier says at which rank, step and chunk."""


class DeadlockError(ScheduleError):
    """A schedule cannot finish: its receives and sends wait for each other in a circle."""


class OverwriteError(ScheduleError):
    """A schedule can only finish by overwriting a chunk that a peer may still read."""
