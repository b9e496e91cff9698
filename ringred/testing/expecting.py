"""What the checks of the conformance kit are made of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ringred.transports.base import Fault, FaultKind, Transport

__all__ = [
    "PATIENCE",
    "Check",
    "barrier",
    "check",
    "expect",
    "expect_half_a_second",
    "expect_same",
    "neighbours_of",
    "pattern",
    "peers_of",
    "ready",
    "soon",
]

Check = Callable[[Transport], None]
"""Called on all ranks at once; raises if the transport is not as it must be."""

PATIENCE = 20.0  # seconds that any message may take on a loaded machine


def check(table: dict[str, Check]) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        table[check.__name__] = check
        return check

    return register


def soon() -> float:
    return time.monotonic() + PATIENCE


def neighbours_of(transport: Transport) -> tuple[int, int]:
    """The ranks to the left and to the right."""
    return (transport.rank - 1) % transport.size, (transport.rank + 1) % transport.size


def peers_of(transport: Transport) -> list[int]:
    """All ranks but this."""
    return [peer for peer in range(transport.size) if peer != transport.rank]


def pattern(count: int, seed: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64) * 31 + seed


def expect(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise AssertionError(f"{what}: expected {expected}, got {got}")


def expect_same(what: str, got: Tensor | None, expected: Tensor) -> None:
    if got is None or not torch.equal(got, expected):
        raise AssertionError(f"{what}: expected {expected[:5]}..., got {None if got is None else got[:5]}...")


def expect_half_a_second(waited: float) -> None:
    """That a wait whose deadline was that far off took so long; another rank's, which ended it, may come earlier."""
    if not 0.2 <= waited < 3:
        raise AssertionError(f"a wait of 0.5 s took {waited:.2f} s")


def barrier(transport: Transport) -> None:
    transport.begin(9, 9)
    token, peers = torch.zeros(1), peers_of(transport)
    sends = [transport.isend(peer, token) for peer in peers]
    receives = [transport.irecv(peer, torch.empty(1), lend=False) for peer in peers]
    for request in [*receives, *sends]:
        transport.wait(request, soon())


def ready(transport: Transport, report: str, turn: int, contract: int | None = None) -> bool:
    """Waits for all ranks and begins. If a faster rank has already aborted, publishes `report`, returns False."""
    try:
        barrier(transport)
        transport.begin(turn if contract is None else contract, turn)
    except Fault as fault:
        if fault.kind not in (FaultKind.ABORTED, FaultKind.PEER):
            raise
        transport.abort(report)
        return False
    return True
