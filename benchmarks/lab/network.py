"""A network that the laboratory makes, and predicts: hosts, the rate of their ports, racks."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Network"]

_CONTROLS = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_PAYLOAD = 1448 / 1514  # of the bytes that a queue counts (frames, without preamble and gap), TCP's payload


class Network:
    """`hosts` hosts of `each` ranks with ports of `mbit` Mbit/s, in `racks` equal racks whose uplinks have
    `uplink_mbit`; the port of the last host has `slow_mbit`. `control` is TCP's congestion control. It stands for a
    network that is `dilation` times as fast."""

    def __init__(
        self,
        hosts: int,
        mbit: float,
        racks: int = 1,
        uplink_mbit: float | None = None,
        slow_mbit: float | None = None,
        each: int = 1,
        control: str = "cubic",
        dilation: float = 1.0,
    ) -> None:
        if hosts % racks:
            raise ValueError(f"expected racks of equal size, got {hosts} hosts in {racks}")
        self.hosts, self.mbit, self.racks, self.each, self.control = hosts, mbit, racks, each, control
        self.dilation = dilation
        self.uplink_mbit, self.slow_mbit = uplink_mbit or mbit, slow_mbit or mbit

    @property
    def ranks(self) -> int:
        """Of all hosts; those of a host have numbers in a row."""
        return self.hosts * self.each

    @property
    def host_of_rank(self) -> list[int]:
        """The host of each rank."""
        return [rank // self.each for rank in range(self.ranks)]

    def times(self, seconds: float, slowness: float) -> list[float]:
        """What takes each rank so long; those of the last host `slowness` times."""
        return [seconds * (slowness if host == self.hosts - 1 else 1.0) for host in self.host_of_rank]

    @property
    def one_each(self) -> Network:
        """The same with one rank on each host."""
        return Network(self.hosts, self.mbit, self.racks, self.uplink_mbit, self.slow_mbit, control=self.control)

    @property
    def bytes_per_second(self) -> float:
        """Of a port, in one direction, as TCP's payload."""
        return self.mbit * 1e6 / 8 * _PAYLOAD

    def rack_of(self, host: int) -> int:
        """The rack in which a host is."""
        return host // (self.hosts // self.racks)

    def mbit_of(self, host: int) -> float:
        """The rate of a host's port."""
        return self.slow_mbit if host == self.hosts - 1 else self.mbit

    def __str__(self) -> str:
        gbit = self.mbit * self.dilation / 1e3
        fast = "" if self.dilation == 1 else f" ({gbit:g} Gbit/s, {self.dilation:g} times slower)"
        slow = "" if self.slow_mbit == self.mbit else f", one of {self.slow_mbit:g} Mbit/s"
        racks = "" if self.racks == 1 else f" in {self.racks} racks with uplinks of {self.uplink_mbit:g} Mbit/s"
        ranks = "" if self.each == 1 else f" with {self.each} ranks each"
        control = "" if self.control == "cubic" else f", TCP's {self.control}"
        return f"{self.hosts} hosts of {self.mbit:g} Mbit/s{fast}{slow}{racks}{ranks}{control}"

    @property
    def unavailable(self) -> str | None:
        """Why this machine cannot make it; None if it can."""
        known = _CONTROLS.read_text().split() if _CONTROLS.exists() else []
        return None if self.control in known else f"this kernel has no {self.control} (modprobe tcp_{self.control})"
