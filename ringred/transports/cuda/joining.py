"""Transports between the devices of ranks that already reach each other's host memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ringred.errors import TransportUnavailable
from ringred.transports.base import Fault, Transport
from ringred.transports.cuda.driver import Driver
from ringred.transports.cuda.memory import PeersUnreachable
from ringred.transports.cuda.plane import DevicePlane
from ringred.transports.cuda.staged import StagedTransport
from ringred.transports.local import Hub
from ringred.transports.routed import RoutedTransport, alone
from ringred.transports.shm import ShmTransport

__all__ = ["DRIVERS", "named", "transport", "with_index"]

_ASKING = 0x52494E47  # the contract of the question whether all ranks have a device


def transport(between: Transport, driver: Callable[[], Driver], key: str, timeout: float) -> Transport:
    """As `between`, for memory of the device of each rank's `driver()`: ranks of one host open each other's, between
    hosts messages go by the host's memory. Collective, with a `key` that was used for nothing else. Raises
    `TransportUnavailable`, on every rank, if any rank's driver or memory cannot be used."""
    if between.size == 1:
        return Hub(1).transport(0)
    near: Any = getattr(between, "near", between)
    if not isinstance(near, ShmTransport):
        return _between_hosts(between, None, driver, key, timeout)
    if len(near.peers) + 1 == between.size:
        try:
            return near.on_device(driver, key)
        except PeersUnreachable:  # on every rank
            return _between_hosts(near, None, driver, f"{key} by the host", timeout)
    far: Any = between
    return _between_hosts(far.far, near, driver, key, timeout)


def _between_hosts(
    far: Transport, near: ShmTransport | None, driver: Callable[[], Driver], key: str, timeout: float
) -> Transport:
    beside: ShmTransport | None = None
    trouble: Exception | None = None
    try:
        if near is None:
            own = driver()
        else:
            beside = near.on_device(driver, key)
            assert beside.queue is not None, "it is of a device"
            own = beside.queue.driver
    except Exception as failure:  # whatever a driver may raise, the others hear of it
        trouble = failure
    apart: Transport | None = None
    try:
        apart = far.subset(range(far.size), key)
        refused = _refused(apart, trouble is None, timeout)
    except BaseException:
        _close(apart, beside)
        raise
    if refused:
        _close(apart, beside)
        text = f"rank {refused[0]} cannot, and says why" if trouble is None else f"{trouble}"
        raise TransportUnavailable(f"rank {far.rank}: {key}: {text}") from trouble
    staged = StagedTransport(apart, own, timeout)
    if beside is not None:
        return RoutedTransport(beside, staged)
    return alone(staged, own.name, DevicePlane.far_part_bytes) if "+" in far.model else staged


def _close(*made: Transport | None) -> None:
    for one in made:
        if one is not None:
            one.close()


def _refused(apart: Transport, fine: bool, timeout: float) -> list[int]:
    """The ranks that are not fine."""
    apart.begin(_ASKING, -1)
    mine, said = torch.tensor([fine]), torch.ones(apart.size, dtype=torch.bool)
    peers = [peer for peer in range(apart.size) if peer != apart.rank]
    received = [apart.irecv(peer, said[peer : peer + 1], False) for peer in peers]
    sent = [apart.isend(peer, mine) for peer in peers]
    deadline = time.monotonic() + timeout
    try:
        for request in (*received, *sent):
            apart.wait(request, deadline)
    except Fault as fault:
        raise TransportUnavailable(f"rank {apart.rank}: asked all ranks for their devices: {fault}") from fault
    said[apart.rank] = fine
    return [rank for rank, yes in enumerate(said.tolist()) if not yes]


def with_index(device: torch.device) -> torch.device:
    """The device that torch means by one without an index: the current one of its type."""
    if device.index is not None or (device.type == "cuda" and not torch.cuda.is_available()):
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


def named(device: torch.device) -> str:
    """What a device is called."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def _cuda(device: torch.device, cache: Path) -> Driver:
    """The driver for one of torch's CUDA devices. Raises `TransportUnavailable`."""
    from ringred.transports.cuda import cupy_driver

    reason = cupy_driver.unavailable(device.index)
    if reason is not None:
        raise TransportUnavailable(f"{device} cannot be used: {reason}")
    return cupy_driver.CudaDevice(device.index, cache)


DRIVERS: dict[str, Callable[[torch.device, Path], Driver]] = {"cuda": _cuda}
"""By torch's device type: makes the driver of one device, which may keep what it compiles in a folder."""
