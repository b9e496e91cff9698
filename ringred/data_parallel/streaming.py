"""Copies of gradients into buckets that are longer than a core's cache: written past it.

An ordinary copy reads a line of the target before it overwrites it, and fills the cache that backward wants with what
the reduction will find in memory anyway.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ringred.native import player

__all__ = ["copier"]

_BUCKET_BYTES = 4 << 20
_GRADIENT_BYTES = 256 << 10


def copier(bucket_bytes: int) -> Callable[[Tensor, Tensor], object]:
    """How to copy a gradient to its view in a bucket of so many bytes."""
    return Tensor.copy_ if player is None or bucket_bytes < _BUCKET_BYTES else _past_the_cache


def _past_the_cache(view: Tensor, gradient: Tensor) -> None:
    alike = gradient.dtype == view.dtype and gradient.stride() == view.stride() and gradient.shape == view.shape
    if gradient.nbytes < _GRADIENT_BYTES or not alike or not gradient.is_cpu or gradient.is_conj() or gradient.is_neg():
        view.copy_(gradient)
        return
    assert player is not None, "else there is another copier"
    player.stream(view.data_ptr(), gradient.data_ptr(), view.nbytes)
