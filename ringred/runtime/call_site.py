"""Where in the user's program a collective was called."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from pathlib import Path
from types import FrameType

import torch

__all__ = ["call_site", "in_libraries"]

_LIBRARIES = (
    str(Path(__file__).resolve().parents[1]) + os.sep,
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    *(module.__file__ or "" for module in (contextlib, threading)),
)


@functools.cache
def in_libraries(file: str) -> bool:
    """Whether a file is part of ringred, torch, or what calls the user's code."""
    return file.startswith(_LIBRARIES)


def call_site(frame: FrameType) -> str:
    """FILE:LINE of the innermost frame outside of ringred and torch."""
    while frame.f_back is not None and in_libraries(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
