"""The arithmetic of compressed gradients: 8-bit blocks, largest elements, low-rank factors. No communication here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dequantised", "largest", "low_rank_shape", "orthonormal", "quantised", "spread"]

_INT8 = 127


def quantised(blocks: Tensor, left_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales of `blocks`, [n, block] of float32: each block has one scale, its greatest
    magnitude divided by 127. `left_out`, of the same shape, receives the rounding error. If a block holds NaN or
    infinity, its scale is not finite, and its NaN and infinity are not carried over into `left_out`."""
    work = torch.empty_like(blocks) if left_out is None else left_out
    scales = torch.abs(blocks, out=work).amax(1).div_(_INT8)  # several times faster than torch.linalg's ∞-norm
    steps = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(1)
    torch.div(blocks, steps, out=work).round_().clamp_(-_INT8, _INT8)  # if a tiny scale was rounded down
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
    """Writes the blocks that `quantised` turned into int8 `values` and `scales` to `out`, [n, block] of float32."""
    return out.copy_(values).mul_(scales.unsqueeze(1))


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The indices (int32) and values of the `count` elements of 1-D `values` with the greatest magnitude; NaN counts as
    the greatest."""
    magnitudes = values.abs()
    places = _candidates(magnitudes, count)
    if places is None:
        places = magnitudes.topk(count, sorted=False).indices
    else:
        places = places[magnitudes[places].topk(count, sorted=False).indices]
    return places.to(torch.int32), values[places]


def _candidates(magnitudes: Tensor, count: int) -> Tensor | None:
    """The indices of a few more than the `count` greatest elements: those above a threshold estimated from a sample.
    None if this does not pay, or if the estimate leaves fewer than `count`. One pass over all elements is several times
    faster than a top-k over them."""
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
    """The (rows, columns) of `shape` seen as a matrix; None if two factors of `rank` columns are not smaller."""
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
