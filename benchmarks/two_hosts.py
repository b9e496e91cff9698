"""Two hosts on one machine: network namespaces with names of their own, and a cable of so many Mbit/s between them.

Needs root, iproute2, and `tc` if the cable is to be slow. Nothing leaves the machine.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

__all__ = ["TwoHosts"]

_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_NAMED = """
import os, socket, sys
socket.sethostname(os.environ["HOST_NAME"])
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class TwoHosts:
    """The hosts, as a context: at its end, ranks that still run are killed and the namespaces removed."""

    def __init__(self, each: int, mbit: int | None = None) -> None:
        self.each, self.mbit = each, mbit
        self.ranks: list[subprocess.Popen[str]] = []
        self._spaces = [f"ringred-{os.getpid()}-{host}" for host in range(2)]

    def __enter__(self) -> TwoHosts:
        try:
            for space in self._spaces:
                _run("ip", "netns", "add", space)
            # Both ends are made where they belong: this namespace never sees them.
            first, second = self._spaces
            _run("ip", "-n", first, *["link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns"], second)
            for space, address in zip(self._spaces, _ADDRESSES, strict=True):
                _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "cable")
                _run("ip", "-n", space, "link", "set", "cable", "up")
                _run("ip", "-n", space, "link", "set", "lo", "up")
                if self.mbit is not None:
                    limits = f"rate {self.mbit}mbit burst 256kb latency 50ms".split()
                    _run("tc", "-n", space, *["qdisc", "add", "dev", "cable", "root", "tbf"], *limits)
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self, program: str, *arguments: str, stdout: int | IO[str] = subprocess.PIPE, **variables: Any) -> None:
        """Starts `program` on all ranks, as torchrun would; each prints to a pipe of its own."""
        for rank in range(2 * self.each):
            host = rank // self.each
            there = {"RANK": rank, "WORLD_SIZE": 2 * self.each, "MASTER_ADDR": _ADDRESSES[0], "MASTER_PORT": 29501}
            there |= {"RINGRED_INTERFACE": _ADDRESSES[host], "HOST_NAME": f"host{host}", **variables}
            command = ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts", sys.executable, "-c", _NAMED]
            environment = {**os.environ, **{name: str(value) for name, value in there.items()}}
            started = subprocess.Popen([*command, program, *arguments], env=environment, stdout=stdout, text=True)
            self.ranks.append(started)

    def wait(self, timeout: float) -> list[str]:
        """What each rank printed, once all have ended."""
        return [rank.communicate(timeout=timeout)[0] or "" for rank in self.ranks]

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
            rank.wait()
            if rank.stdout is not None:
                rank.stdout.close()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


def _run(*words: str | Sequence[str]) -> None:
    subprocess.run(words, check=True)  # type: ignore[arg-type]
