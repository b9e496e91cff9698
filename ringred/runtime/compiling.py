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
from torch.distributed.algorithms.join import Joinable
from torch.nn.parallel import distributed as _torch_ddp

__all__ = ["active_ddp_module", "compiled_in_buckets", "never_compiled", "not_compiled"]

# Not by its name: programs put ringred's class, or a function, in the place of it.
_TorchDDP: Any = next(
    kind
    for kind in Joinable.__subclasses__()
    if (kind.__module__, kind.__qualname__) == (_torch_ddp.__name__, "DistributedDataParallel")
)

_C = TypeVar("_C", bound=type)
_F = TypeVar("_F", bound=Callable[..., Any])


def never_compiled(group: _C) -> _C:
    """Class decorator: torch.compile does not trace the methods of the class, nor anything that they call.

    torch's C++ calls these methods from compiled programs, and the compiler would trace them there. This makes them as
    opaque to it as process groups in C++. (`torch.compiler.disable` would do so too, but imports the compiler.)
    """
    for value in vars(group).values():
        if isinstance(value, FunctionType):
            _skip(value, callees=True)
    return group


def not_compiled(*, callees: bool) -> Callable[[_F], _F]:
    """Decorates a function that torch.compile must not trace; with `callees`, nor anything that it calls."""

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
    """Within this context torch.compile splits its graphs where buckets of `bucket_bytes` end, so that gradients do not
    all come at the end of backward. It does so by itself for torch's DistributedDataParallel."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    before = _TorchDDP._active_ddp_module
    _TorchDDP._active_ddp_module = _Buckets(bucket_bytes)
    try:
        yield
    finally:
        _TorchDDP._active_ddp_module = before


def active_ddp_module() -> Any:
    """What torch.compile is told of the wrapper whose forward is running."""
    return _TorchDDP._active_ddp_module


class _Buckets:
    """The attributes that the compiler reads from a DistributedDataParallel."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes_cap = max(bucket_bytes, 1 << 20)  # the compiler's first bucket has 1 MiB
