"""What differs between versions of torch, or is not public in any. Tried with 2.11, 2.13 and 2.15."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar

import torch

__all__ = ["Backend", "among_others", "compiled_in_buckets", "group_of", "never_compiled", "not_compiled"]


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
    theirs: Any = torch.nn.parallel.DistributedDataParallel
    before = theirs._active_ddp_module
    theirs._active_ddp_module = _Buckets(bucket_bytes)
    try:
        yield
    finally:
        theirs._active_ddp_module = before


class _Buckets:
    """What the compiler asks of a DistributedDataParallel."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes_cap = max(bucket_bytes, 1 << 20)  # the compiler's first bucket has 1 MiB
