"""Detects this machine: host, cores, sockets and memory. Asks the operating system; imports nothing heavy."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "host_indices", "host_name", "local_grid", "machine"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores this process may use, cores and sockets of the machine, bytes of memory."""

    host: str
    usable_cores: int
    cores: int
    sockets: int
    memory_bytes: int
    processor: str


def host_name() -> str:
    """The name that distinguishes this host from others; a container or namespace has its own name."""
    return socket.gethostname()


def machine() -> Machine:
    """This machine, as the kernel describes it."""
    model, packages = "unknown", set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() == "physical id":
            packages.add(value.strip())
    return Machine(
        host=host_name(),
        usable_cores=len(os.sched_getaffinity(0)),
        cores=os.cpu_count() or 1,
        sockets=max(1, len(packages)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        processor=model,
    )


def host_indices(names: Sequence[str]) -> tuple[int, ...]:
    """The host of each rank as a number, counted in the order in which hosts first appear."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(name, len(numbers)) for name in names)


def local_grid(hosts: Sequence[int]) -> tuple[int, int] | None:
    """The grid (ranks on a host, hosts) if every host holds the same number of consecutive ranks, else None.

    Also None if there is only one host, or only one rank on each: then there is no grid of hosts.
    """
    count = len(set(hosts))
    each = len(hosts) // count
    regular = list(hosts) == [host for host in range(count) for _ in range(each)]
    return (each, count) if regular and min(each, count) > 1 else None
