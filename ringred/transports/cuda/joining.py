"""Transports between the devices of ranks that already reach each other's host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ringred.errors import TransportUnavailable
from ringred.transports.base import Transport
from ringred.transports.cuda.driver import Driver
from ringred.transports.local import Hub
from ringred.transports.shm import ShmTransport

__all__ = ["DRIVERS", "transport", "with_index"]


def transport(between: Transport, driver: Callable[[], Driver], key: str) -> Transport:
    """As `between`, for memory of the device of each rank's `driver()`. Collective, with a `key` that was used for
    nothing else. Raises `TransportUnavailable`, on every rank, if any rank's driver or memory cannot be used."""
    if between.size == 1:
        return Hub(1).transport(0)
    near: Any = getattr(between, "near", between)
    if not isinstance(near, ShmTransport) or len(near.peers) + 1 < between.size:
        raise TransportUnavailable(
            f"rank {between.rank}: tensors of a device are reduced between ranks of one host, and here ranks are "
            f"connected by {between.name}"
        )
    return near.on_device(driver, key)


def with_index(device: torch.device) -> torch.device:
    """The device that torch means by one without an index: the current one of its type."""
    if device.index is not None or (device.type == "cuda" and not torch.cuda.is_available()):
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


def _cuda(device: torch.device) -> Driver:
    """The driver for one of torch's CUDA devices. Raises `TransportUnavailable`."""
    from ringred.transports.cuda import cupy_driver

    reason = cupy_driver.unavailable(device.index)
    if reason is not None:
        raise TransportUnavailable(f"{device} cannot be used: {reason}")
    return cupy_driver.CudaDevice(device.index)


DRIVERS: dict[str, Callable[[torch.device], Driver]] = {"cuda": _cuda}
"""By torch's device type: makes the driver of one device."""
