"""How the gradient of a piece lies in a message: as it is, in 16 bits, in 8 bits, or its largest elements only.

The same arithmetic as the hooks of the same names in `ringred.hooks`; what an encoding leaves out is kept at the worker
and added to the next gradient (error feedback: Karimireddy et al., ICML 2019; Stich et al., NeurIPS 2018).
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ringred.data_parallel.compression import dequantised, largest, quantised

__all__ = ["RAW", "Encoding", "decoded", "encoding_of"]

RAW, _FLOAT16, _BFLOAT16, _INT8, _TOP_K = range(5)
_HALVES = {_FLOAT16: torch.float16, _BFLOAT16: torch.bfloat16}
_COUNT = struct.Struct("<q")


class Encoding:
    """The base: gradients as they are. One object for each worker, because it keeps what it left out."""

    code = RAW

    def __init__(self) -> None:
        self._left_out: dict[int, Tensor] = {}

    def encoded(self, piece: int, gradient: Tensor) -> Tensor:
        """The bytes for `gradient`, 1-D; its memory itself if nothing has to be changed."""
        return gradient

    def left_out(self, piece: int, gradient: Tensor) -> Tensor:
        """`gradient` and what was left out of the one before, as new float32; the caller keeps there what it leaves
        out."""
        kept = self._left_out.get(piece)
        if kept is None or kept.numel() < gradient.numel():
            kept = self._left_out[piece] = torch.zeros(gradient.numel())
        kept[: gradient.numel()] += gradient
        return kept


class Half(Encoding):
    """16 bits for each element: float16, or bfloat16."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.code = {torch.float16: _FLOAT16, torch.bfloat16: _BFLOAT16}[dtype]
        self.dtype = dtype

    def encoded(self, piece: int, gradient: Tensor) -> Tensor:
        return gradient.to(self.dtype)


class Int8(Encoding):
    """8 bits for each element, and a float32 scale for each `block` of them."""

    code = _INT8

    def __init__(self, block: int = 256) -> None:
        super().__init__()
        self.block = block

    def encoded(self, piece: int, gradient: Tensor) -> Tensor:
        count = -(-gradient.numel() // self.block)
        padded = torch.zeros(count * self.block)
        padded[: gradient.numel()] = gradient
        kept = self._left_out.setdefault(piece, torch.zeros_like(padded))
        padded += kept
        values, scales = quantised(padded.view(count, self.block), kept.view(count, self.block))
        header = torch.frombuffer(bytearray(_COUNT.pack(self.block)), dtype=torch.uint8)
        return torch.cat([header, scales.view(torch.uint8), values.view(-1).view(torch.uint8)])


class TopK(Encoding):
    """The fraction `ratio` of the elements, those with the greatest magnitudes, with their places: 8 bytes for each."""

    code = _TOP_K

    def __init__(self, ratio: float = 0.01) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"top_k: expected 0 < ratio ≤ 1, got {ratio}")
        self.ratio = ratio

    def encoded(self, piece: int, gradient: Tensor) -> Tensor:
        kept = self.left_out(piece, gradient)
        places, values = largest(kept, max(1, int(self.ratio * kept.numel())))
        kept[places] = 0
        kept.nan_to_num_(0.0, 0.0, 0.0)
        return torch.cat([places, values.view(torch.int32)])


def encoding_of(name: str | None) -> Encoding:
    """The encoding called "half", "bfloat16", "int8" or "top_k:0.01"; None for gradients as they are."""
    kind, _, number = (name or "raw").partition(":")
    makers: dict[str, Any] = {
        "raw": Encoding,
        "half": Half,
        "bfloat16": lambda: Half(torch.bfloat16),
        "int8": Int8,
        "top_k": lambda: TopK(float(number or 0.01)),
    }
    if kind not in makers or (number and kind != "top_k"):
        raise ValueError(f"compression is one of {', '.join(makers)}, as in 'top_k:0.01', or None; got {name!r}")
    made: Encoding = makers[kind]()
    return made


def decoded(code: int, frame: Any, elements: int, dtype: torch.dtype) -> Tensor:
    """The gradient of `elements` elements of `dtype` in `frame`: its memory itself if it lies there as it is.

    Raises `ValueError` if the frame has another length than that, or places that are not there.
    """
    if code == RAW:
        return _exactly(frame, elements, dtype)
    if code in _HALVES:
        return _exactly(frame, elements, _HALVES[code]).to(dtype)
    data = _exactly(frame, len(frame) if not isinstance(frame, Tensor) else frame.nbytes, torch.uint8)
    if code == _INT8:
        if data.numel() < _COUNT.size:
            raise ValueError(f"expected 8 bits for each of {elements} elements, got {data.numel()} bytes")
        block = int(data[: _COUNT.size].clone().view(torch.int64))
        count = -(-elements // block) if 0 < block <= 1 << 20 else -1
        if data.numel() != _COUNT.size + count * (4 + block):
            raise ValueError(f"expected 8 bits for each of {elements} elements, got {data.numel()} bytes")
        scales = data[_COUNT.size : _COUNT.size + 4 * count].view(torch.float32)
        values = data[_COUNT.size + 4 * count :].view(torch.int8).view(count, block)
        return dequantised(values, scales, torch.empty(count, block)).view(-1)[:elements].to(dtype)
    if code == _TOP_K:
        if data.numel() % 8:
            raise ValueError(f"expected places and values, 8 bytes for each element, got {data.numel()} bytes")
        places, values = data.view(torch.int32).chunk(2) if data.numel() else (data, data)
        if data.numel() and not (int(places.min()) >= 0 and int(places.max()) < elements):
            raise ValueError(f"a place is not within {elements} elements")
        out = torch.zeros(elements, dtype=dtype)
        if data.numel():
            out[places.long()] = values.view(torch.float32).to(dtype)
        return out
    raise ValueError(f"no encoding has the number {code}")


def _exactly(frame: Any, elements: int, dtype: torch.dtype) -> Tensor:
    """Raises `ValueError` unless the frame is of `elements` elements."""
    nbytes = frame.nbytes if isinstance(frame, Tensor) else len(frame)
    if nbytes != elements * dtype.itemsize:
        raise ValueError(f"expected {elements} elements of {dtype}, {elements * dtype.itemsize} bytes; got {nbytes}")
    if not nbytes:
        return torch.empty(0, dtype=dtype)
    if isinstance(frame, Tensor):
        return frame.reshape(-1).view(dtype) if frame.dtype != dtype else frame.reshape(-1)
    return torch.frombuffer(frame, dtype=dtype)
