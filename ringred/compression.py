"""The arithmetic of compressed gradients: 8-bit blocks, largest elements, low-rank factors. No communication here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dequantised", "largest", "low_rank_shape", "orthonormal", "quantised", "spread"]

_INT8 = 127


def quantised(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales of `blocks`, [n, block] in a floating dtype: one scale a block, its greatest
    magnitude over 127. What is not finite makes the scale of its block not finite."""
    scales = blocks.abs().amax(1).float() / _INT8
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (blocks / steps.unsqueeze(1)).round_().nan_to_num_(0.0).clamp_(-_INT8, _INT8).to(torch.int8), scales


def dequantised(values: Tensor, scales: Tensor) -> Tensor:
    """The float32 that `quantised` made int8 `values`, [n, block], and `scales` of."""
    return values.float() * scales.unsqueeze(1)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places (int32) and values of the `count` elements of 1-D `values` that are the greatest in magnitude."""
    places = values.abs().topk(count, sorted=False).indices
    return places.to(torch.int32), values[places]


def spread(places: Sequence[Tensor], values: Sequence[Tensor], out: Tensor) -> None:
    """`out` = the sum of sparse vectors, added in the order in which they are given."""
    out.zero_()
    for place, value in zip(places, values, strict=True):
        out.index_add_(0, place, value)


def low_rank_shape(shape: Sequence[int], rank: int) -> tuple[int, int] | None:
    """The matrix that a gradient of `shape` is seen as, if two factors of `rank` columns are smaller than it."""
    if len(shape) < 2:
        return None
    rows, columns = shape[0], 1
    for extent in shape[1:]:
        columns *= extent
    return (rows, columns) if (rows + columns) * rank < rows * columns else None


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the space that `columns`, [n, rank] of float32 or float64, span; n ≥ rank or not."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis
