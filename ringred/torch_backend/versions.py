"""Code that depends on the torch version or uses torch's private API. Tested with torch 2.11, 2.13 and 2.15."""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["Backend", "among_others", "group_of"]


def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


Backend: Any = torch._C._distributed_c10d.Backend if _version() >= (2, 14) else None
"""torch's base class for a Python backend of one device in a process group; None before torch 2.14."""


def among_others() -> bool:
    """Whether the group that torch is making has another backend too ("cpu:ringred,cuda:nccl"). torch does not
    pass this to the function that creates a backend, so it is read from torch's stack frame."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_new_process_group_helper":
        if frame.f_back is None:
            return False
        frame = frame.f_back
    config = frame.f_locals.get("backend_config")
    return config is not None and len(set(config.get_device_backend_map().values())) > 1


def group_of(process_group: Any) -> Any:
    """The backend for CPU tensors in a torch process group, or None."""
    try:
        return process_group._get_backend(torch.device("cpu"))
    except (AttributeError, RuntimeError):  # not a member of it, or no backend for the CPU
        return None
