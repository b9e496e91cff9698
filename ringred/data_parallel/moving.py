"""Inputs of a forward, moved to the device of the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.utils as _utils

__all__ = ["moved"]


def moved(device: torch.device, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """`inputs` and `kwargs` with all tensors in them on `device`, as torch's DistributedDataParallel moves them."""
    there: Any = _utils._to_kwargs(inputs, kwargs, device, False)
    return there[0][0], there[1][0]
