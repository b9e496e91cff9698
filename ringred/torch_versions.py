"""What differs between versions of torch, or is not public in any. Tried with torch 2.13; used by `c10d`."""

from __future__ import annotations

from types import FunctionType
from typing import Any, TypeVar

import torch

__all__ = ["never_compiled"]

_C = TypeVar("_C", bound=type)


def never_compiled(group: _C) -> _C:
    """A class whose methods torch.compile leaves alone, and all that they call.

    torch's C++ calls them from within compiled programs, and then the compiler would look into them: they are as opaque
    to it as those of the process groups in C++. (`torch.compiler.disable` would import the compiler to say so.)
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if not hasattr(frames, "set_code_exec_strategy"):  # before torch 2.8
        return group
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    for value in vars(group).values():
        if isinstance(value, FunctionType):
            frames.set_code_exec_strategy(value.__code__, skip)
    return group
