"""A member's card: its number in the job, and where it listens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Card", "place"]


class Card(NamedTuple):
    """A process of a job, or a thread where ranks are threads. `identity` is random and no other's. It listens on the
    Unix socket `name` of its `place`, and, if `port` is not 0, at `host` and `port`."""

    identity: str
    process: int
    place: str
    name: str
    host: str = ""
    port: int = 0

    def as_text(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def from_text(cls, text: str) -> Card:
        """Raises `ValueError` unless `text` is what `as_text` returned."""
        parts = text.split(" ")
        if len(parts) != 6:
            raise ValueError(f"expected the card of a process, got {text[:80]!r}")
        return cls(parts[0], int(parts[1]), parts[2], parts[3], parts[4], int(parts[5]))

    def is_here(self) -> bool:
        """Whether a Unix socket of this process reaches it."""
        return self.place == place()

    def __str__(self) -> str:
        return f"process {self.process}" + (f" at {self.host}:{self.port}" if self.port else "")


def place() -> str:
    """A text that is the same in processes that can share memory: the kernel, the network namespace, the user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}/{os.geteuid()}"
