"""What differs between versions of torch, or is not public in any. Tried with 2.11, 2.13 and 2.15."""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["Backend", "among_others", "group_of"]


def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


Backend: Any = torch._C._distributed_c10d.Backend if _version() >= (2, 14) else None
"""What serves one device within torch's process group, to be subclassed in Python; None before torch 2.14."""


def among_others() -> bool:
    """Whether the group that torch is making has another backend too ("cpu:ringred,cuda:nccl"). It does not say so to
    those whom it asks to make one, so this looks at what it is doing."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_new_process_group_helper":
        if frame.f_back is None:
            return False
        frame = frame.f_back
    config = frame.f_locals.get("backend_config")
    return config is not None and len(set(config.get_device_backend_map().values())) > 1


def group_of(process_group: Any) -> Any:
    """What serves the CPU tensors of a process group of torch."""
    try:
        return process_group._get_backend(torch.device("cpu"))
    except (AttributeError, RuntimeError):  # not a member of it, or no backend for the CPU
        return None
