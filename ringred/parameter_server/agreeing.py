"""What the ranks of a communicator tell each other in few bytes: texts, numbers, and that one of them failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ringred import errors
from ringred.communicator import Communicator
from ringred.errors import RingredError

__all__ = ["from_first", "gathered", "numbers", "together"]

_CARD = 1024  # bytes of a rank's text
T = TypeVar("T")


def gathered(comm: Communicator, text: str) -> list[str]:
    """The text of every rank."""
    data = text.encode()
    if len(data) > _CARD:
        raise ValueError(f"rank {comm.rank}: a text of {len(data)} bytes; there is room for {_CARD}")
    own = torch.zeros(_CARD, dtype=torch.uint8)
    own[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    everyone = torch.empty(_CARD * comm.size, dtype=torch.uint8)
    comm.all_gather(everyone, own)
    return [bytes(card.tolist()).rstrip(b"\0").decode(errors="replace") for card in everyone.view(comm.size, _CARD)]


def numbers(comm: Communicator, own: Sequence[int]) -> list[list[int]]:
    """The numbers of every rank, as many as this one's."""
    table = torch.empty(comm.size * len(own), dtype=torch.int64)
    comm.all_gather(table, torch.tensor(own, dtype=torch.int64))
    rows: list[list[int]] = table.view(comm.size, len(own)).tolist()
    return rows


def together(comm: Communicator, act: Callable[[], T]) -> T:
    """What `act` returns. If it raises a `RingredError` on any rank, all ranks raise that of the first."""
    failure, result = None, None
    try:
        result = act()
    except RingredError as error:
        failure = error
    failed = numbers(comm, [failure is not None])
    if [True] in failed:
        raise _told(comm, failed.index([True]), failure)
    return result  # type: ignore[return-value]


def from_first(comm: Communicator, act: Callable[[], Sequence[int]], count: int) -> list[int]:
    """The `count` numbers that `act` returns on rank 0, on every rank; or the `RingredError` that it raises there."""
    failure = None
    told = torch.zeros(1 + count, dtype=torch.int64)
    if comm.rank == 0:
        try:
            told[1:] = torch.tensor(act(), dtype=torch.int64)
        except RingredError as error:
            failure = error
            told[0] = 1
    comm.broadcast(told, 0)
    if told[0]:
        raise _told(comm, 0, failure)
    return [int(number) for number in told[1:]]


def _told(comm: Communicator, rank: int, own: RingredError | None) -> RingredError:
    """The failure of `rank`, where it is not this one's own."""
    text = "" if own is None else f"{type(own).__name__}\n{own}"
    kind, _, said = gathered(comm, text.encode()[:_CARD].decode(errors="ignore"))[rank].partition("\n")
    if own is not None:
        return own
    made = getattr(errors, kind, RingredError)
    return made(said) if issubclass(made, RingredError) else RingredError(said)
