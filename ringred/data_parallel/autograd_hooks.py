"""Hooks in autograd that hold their owner weakly: they live as long as the parameters, which must not keep it alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["at_the_end_of_backward", "register", "weakly"]

_T = TypeVar("_T")


def weakly(owner: _T, method: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    """A hook that calls `method(owner, *arguments)` while `owner` is alive, whatever autograd passes to it."""
    reference = weakref.ref(owner)

    def hook(*ignored: Any) -> None:
        alive = reference()
        if alive is not None:
            method(alive, *arguments)

    return hook


def register(owner: object, hooks: Sequence[tuple[Tensor, Callable[..., None]]]) -> None:
    """Calls each hook when the gradient of its parameter was accumulated, until `owner` is gone."""
    handles = [parameter.register_post_accumulate_grad_hook(hook) for parameter, hook in hooks]
    weakref.finalize(owner, _remove, handles)


def at_the_end_of_backward(callback: Callable[[], None]) -> None:
    """Calls `callback` when the backward that is running ends."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
