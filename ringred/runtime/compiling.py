"""What torch.compile is told of ringred's code: what to leave alone, and where to cut what it compiles.

torch has no public way to say either without importing the compiler. Tried with torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch.nn.parallel import distributed as _torch_ddp

__all__ = ["compiled_in_buckets", "never_compiled", "not_compiled"]

# Taken now: programs put ringred's class in the place of torch's name later on.
_TorchDDP: Any = _torch_ddp.DistributedDataParallel

_C = TypeVar("_C", bound=type)
_F = TypeVar("_F", bound=Callable[..., Any])


def never_compiled(group: _C) -> _C:
    """A class whose methods torch.compile leaves alone, and all that they call.

    torch's C++ calls them from within compiled programs, and then the compiler would look into them: they are as opaque
    to it as those of the process groups in C++. (`torch.compiler.disable` would import the compiler to say so.)
    """
    for value in vars(group).values():
        if isinstance(value, FunctionType):
            _skip(value, callees=True)
    return group


def not_compiled(*, callees: bool) -> Callable[[_F], _F]:
    """Decorates a function that torch.compile is to leave alone, and with `callees` all that it calls."""

    def decorated(function: _F) -> _F:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]  # where a compiled caller would inline it
        _skip(function, callees)
        return function

    return decorated


def _skip(function: Any, callees: bool) -> None:
    frames: Any = torch._C._dynamo.eval_frame
    below = frames._FrameAction.SKIP if callees else frames._FrameAction.DEFAULT
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, below)
    frames.set_code_exec_strategy(function.__code__, strategy)


@contextmanager
@not_compiled(callees=False)
def compiled_in_buckets(bucket_bytes: int) -> Iterator[None]:
    """What torch.compile compiles within is cut where buckets of `bucket_bytes` end, so that gradients do not all come
    at the end of backward: as it does of itself for torch's DistributedDataParallel."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    before = _TorchDDP._active_ddp_module
    _TorchDDP._active_ddp_module = _Buckets(bucket_bytes)
    try:
        yield
    finally:
        _TorchDDP._active_ddp_module = before


class _Buckets:
    """What the compiler asks of a DistributedDataParallel."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes_cap = max(bucket_bytes, 1 << 20)  # the compiler's first bucket has 1 MiB
