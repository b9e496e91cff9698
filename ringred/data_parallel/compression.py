"""The arithmetic of compressed gradients: 8-bit blocks, largest elements, low-rank factors. No communication here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dequantised", "largest", "low_rank_shape", "orthonormal", "quantised", "spread"]

_INT8 = 127


def quantised(blocks: Tensor, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales of `blocks`, [n, block] of float32: one scale a block, its greatest magnitude over
    127. `left_out`, of the same shape, gets what rounding left out. Where a block holds what is not finite its scale
    tells so, and nothing of it is left out."""
    work = torch.empty_like(blocks) if left_out is None else left_out
    scales = torch.abs(blocks, out=work).amax(1).div_(_INT8)  # some times faster than the ∞-norm of torch.linalg
    steps = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(1)
    torch.div(blocks, steps, out=work).round_().clamp_(-_INT8, _INT8)  # a scale may be rounded down to nothing
    finite = bool(torch.isfinite(scales).all())
    if not finite:
        work.nan_to_num_(0.0, 0.0, 0.0)
    values = work.to(torch.int8)
    if left_out is not None:
        torch.sub(blocks, work.mul_(steps), out=left_out)
        if not finite:
            left_out.nan_to_num_(0.0, 0.0, 0.0)
    return values, scales


def dequantised(values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """`out`, [n, block] of float32, = what `quantised` made int8 `values` and `scales` of."""
    return out.copy_(values).mul_(scales.unsqueeze(1))


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places (int32) and values of the `count` elements of 1-D `values` that are the greatest in magnitude; what is
    not a number counts as the greatest."""
    magnitudes = values.abs()
    places = _candidates(magnitudes, count)
    if places is None:
        places = magnitudes.topk(count, sorted=False).indices
    else:
        places = places[magnitudes[places].topk(count, sorted=False).indices]
    return places.to(torch.int32), values[places]


def _candidates(magnitudes: Tensor, count: int) -> Tensor | None:
    """The places of a few more than the `count` greatest elements, above a threshold that a sample tells; None where
    that pays not, or the sample deceived. Looking at all elements once is some times faster than sorting among them."""
    if magnitudes.numel() < 1 << 16 or count * 8 > magnitudes.numel():
        return None
    sample = magnitudes[:: max(1, magnitudes.numel() >> 15)]
    kept = int(1.3 * count * sample.numel() / magnitudes.numel()) + 8
    threshold = sample.topk(kept, sorted=False).values.min()
    places = (magnitudes < threshold).logical_not_().nonzero().squeeze(1)
    return places if places.numel() >= count else None


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
