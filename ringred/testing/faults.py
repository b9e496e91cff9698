"""Faults on purpose: a rank that dies, stops, is late, raises, sends a wrong bit or loses its connections, at a
message, a byte or a step that is given or follows from a seed: to see what a program does before it happens by itself.

    faults.inject(comm, "kill rank 2 at message 100")
    faults.inject(comm, "delay rank 1 at step 20 for 3 s", "flip rank 0 at byte 1000000")
    faults.inject(comm, *faults.at_random(seed=7, ranks=4, action="kill", unit="message", most=500))
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringred.communicator import Communicator
from ringred.testing.wrapped import Wrapped
from ringred.transports.base import Request, Transport

__all__ = ["ACTIONS", "Fault", "InjectedFault", "at_random", "full_shm", "inject", "parse"]

ACTIONS = ("kill", "stop", "delay", "raise", "flip", "cut")
UNITS = ("message", "byte", "step")
_TEXT = re.compile(r"(\w+) rank (\d+) at (\w+) (\d+)(?: for ([\d.]+) s)?")
_MOST_SHM = 1 << 30


class InjectedFault(RuntimeError):
    """What "raise" raises."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`action` on `rank` when it sends its `number`-th message or byte, or begins its `number`-th step (a backward of a
    DistributedDataParallel). kill: SIGKILL; stop: SIGSTOP; delay: by `seconds`; raise: an `InjectedFault`; flip: one
    bit of that message; cut: all of its connections."""

    action: str
    rank: int
    unit: str
    number: int
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS or self.unit not in UNITS or self.number < 1:
            raise ValueError(
                f"expected one of {', '.join(ACTIONS)} at one of {', '.join(UNITS)} ≥ 1, got {self.action!r} at "
                f"{self.unit} {self.number}"
            )
        if self.action == "flip" and self.unit == "step":
            raise ValueError("flip is at a message or a byte: a step has none of its own")

    def __str__(self) -> str:
        lasting = f" for {self.seconds:g} s" if self.action == "delay" else ""
        return f"{self.action} rank {self.rank} at {self.unit} {self.number}{lasting}"


def parse(text: str) -> Fault:
    """The fault that a text such as "kill rank 2 at message 100" describes. Raises `ValueError`."""
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"expected a fault such as 'kill rank 2 at message 100' or 'delay ... for 2 s', got {text!r}")
    action, rank, unit, number, seconds = found.groups()
    return Fault(action, int(rank), unit, int(number), float(seconds or 1.0))


def at_random(seed: int, ranks: int, action: str, unit: str, most: int, count: int = 1) -> list[Fault]:
    """`count` faults on ranks and at numbers from 1 to `most` that follow from `seed` alone."""
    chosen = random.Random(f"ringred faults {seed}")
    return [Fault(action, chosen.randrange(ranks), unit, chosen.randint(1, most)) for _ in range(count)]


def inject(comm: Communicator, *faults: Fault | str) -> None:
    """From here on `faults` happen to the ranks of `comm`; to this one, those of its rank. Where one is at a message or
    a byte, plans are played by Python from then on, message by message; the other ranks, and steps, go on as ever.
    Faults at a step happen to a process after others have failed as well; those at a message end with `comm`. Not for
    a communicator that is in use already."""
    parsed = [fault if isinstance(fault, Fault) else parse(fault) for fault in faults]
    mine = [fault for fault in parsed if fault.rank == comm.rank]
    transport = Injecting(comm.transport, mine)
    comm.noted.append(lambda name, value: transport.step(value) if name == "step" else None)
    if any(fault.unit != "step" for fault in mine):
        comm.transport = comm.runner.transport = transport
        comm.runner.play_by_python()


class Injecting(Wrapped):
    """A transport to whose rank faults happen."""

    def __init__(self, inner: Transport, faults: Sequence[Fault]) -> None:
        super().__init__(inner)
        self._left = list(faults)
        self._messages = self._bytes = 0
        self._flipped: list[Tensor] = []  # what was sent in place of others: it is read until their requests are done

    def step(self, number: int) -> None:
        """The program begins a step."""
        for fault in self._due("step", number):
            self._happen(fault)

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> Request:
        self._messages += 1
        self._bytes += src.nbytes
        for fault in self._due("message", self._messages) + self._due("byte", self._bytes):
            if fault.action == "flip":
                src = self._with_a_wrong_bit(src)
            else:
                self._happen(fault)
        return self.inner.isend(peer, src, put, buffered)

    def _due(self, unit: str, number: int) -> list[Fault]:
        due = [fault for fault in self._left if fault.unit == unit and number >= fault.number]
        self._left = [fault for fault in self._left if fault not in due]
        return due

    def _happen(self, fault: Fault) -> None:
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.action == "delay":
            time.sleep(fault.seconds)
        elif fault.action == "raise":
            raise InjectedFault(str(fault))
        elif fault.action == "cut":
            _cut(self.inner)

    def _with_a_wrong_bit(self, src: Tensor) -> Tensor:
        wrong = src.detach().clone()
        if wrong.nbytes:  # of an exponent, where they are floating: lower bits may be lost in the next sum
            width = wrong.element_size()
            wrong.view(torch.uint8)[wrong.numel() // 2 * width + width - 1] ^= 1
        self._flipped.append(wrong)
        return wrong


def _cut(transport: Any) -> None:
    """Closes the connections of a transport under its hands, as a network that fails does."""
    for part in (getattr(transport, "near", None), getattr(transport, "far", None)):
        if part is not None:
            _cut(part)
    neighbours = getattr(transport, "_neighbours", None)
    for connection in () if neighbours is None else neighbours._sockets.values():
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    if hasattr(transport, "_hang_up"):
        transport._hang_up()
    if hasattr(transport, "hub"):
        transport.hub.leave(transport.rank, "its connections were cut")


@contextlib.contextmanager
def full_shm(folder: str = "/dev/shm") -> Iterator[None]:
    """Within it a file takes all that is free in `folder`. Refuses to take more than 1 GiB: `mount -t tmpfs -o
    size=64m` in a mount namespace of its own makes a small one."""
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free > _MOST_SHM:
        raise ValueError(f"full_shm: {folder} has {free >> 20} MiB, which would be memory; expected up to 1024")
    path = Path(folder) / f"ringred-fault-{os.getpid()}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        if free:
            os.posix_fallocate(descriptor, 0, free)
        yield
    finally:
        os.close(descriptor)
        path.unlink()
