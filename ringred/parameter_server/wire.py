"""How a message lies in frames: one of header and fields, then any number of raw tensor memory.

Nothing is pickled, and `unpack` takes what it understands to the last byte or raises `Malformed`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, get_type_hints

from ringred.parameter_server.messages import KINDS
from ringred.parameter_server.partition import Piece
from ringred.parameter_server.policies import Gradient

__all__ = ["Malformed", "pack", "unpack"]

_MAGIC = b"RRPS"
_FORMAT = 1
_HEAD = struct.Struct("<4sBBHQ")  # magic, format, kind, machine, the request's number
_LENGTH = struct.Struct("<I")
_WORD = struct.Struct("<q")
_REAL = struct.Struct("<d")
_NUMBER_OF = {kind: number for number, kind in enumerate(KINDS, 1)}


class Malformed(ValueError):
    """A frame is not a message."""


def pack(machine: int, request: int, message: Any) -> bytes:
    """The first frame of `message`, for `machine`, as request `request` or the answer to it."""
    parts = [_HEAD.pack(_MAGIC, _FORMAT, _NUMBER_OF[type(message)], machine, request)]
    for (put, _), value in zip(_FIELDS[type(message)], message, strict=True):
        put(parts, value)
    return b"".join(parts)


def unpack(frame: bytes | memoryview) -> tuple[int, int, Any]:
    """The machine, the request and the message. Raises `Malformed`."""
    try:
        magic, version, number, machine, request = _HEAD.unpack_from(frame)
        if magic != _MAGIC or version != _FORMAT or not 1 <= number <= len(KINDS):
            raise Malformed(f"magic {magic!r}, format {version}, kind {number}")
        kind = KINDS[number - 1]
        at, values = _HEAD.size, []
        for _, take in _FIELDS[kind]:
            value, at = take(frame, at)
            values.append(value)
    except (struct.error, UnicodeDecodeError, IndexError) as failure:
        raise Malformed(str(failure)) from None
    if at != len(frame):
        raise Malformed(f"{kind.__name__}: {len(frame) - at} bytes too many")
    return machine, request, kind(*values)


_Put = Callable[[list[bytes], Any], None]
_Take = Callable[[Any, int], tuple[Any, int]]


def _plain(layout: struct.Struct) -> tuple[_Put, _Take]:
    def take(frame: Any, at: int) -> tuple[Any, int]:
        return layout.unpack_from(frame, at)[0], at + layout.size

    return lambda parts, value: parts.append(layout.pack(value)), take


def _put_text(parts: list[bytes], value: str) -> None:
    data = value.encode(errors="replace")
    parts += (_LENGTH.pack(len(data)), data)


def _take_text(frame: Any, at: int) -> tuple[str, int]:
    (length,) = _LENGTH.unpack_from(frame, at)
    at += _LENGTH.size
    if at + length > len(frame):
        raise Malformed(f"a text of {length} bytes in a frame of {len(frame)}")
    return bytes(frame[at : at + length]).decode(), at + length


def _array(code: str, width: int, make: Callable[..., Any] | None) -> tuple[_Put, _Take]:
    """A tuple of numbers, or of NamedTuples of `width` numbers."""

    def put(parts: list[bytes], values: Any) -> None:
        numbers = values if make is None else [number for value in values for number in value]
        parts.append(struct.pack(f"<I{len(numbers)}{code}", len(values), *numbers))

    def take(frame: Any, at: int) -> tuple[Any, int]:
        (length,) = _LENGTH.unpack_from(frame, at)
        at += _LENGTH.size
        if at + 8 * width * length > len(frame):
            raise Malformed(f"{length} entries in a frame of {len(frame)} bytes")
        numbers = struct.unpack_from(f"<{width * length}{code}", frame, at)
        if make is not None:
            numbers = tuple(make(*numbers[first : first + width]) for first in range(0, len(numbers), width))
        return numbers, at + 8 * width * length

    return put, take


_LAYOUTS: dict[Any, tuple[_Put, _Take]] = {
    int: _plain(_WORD),
    float: _plain(_REAL),
    str: (_put_text, _take_text),
    tuple[int, ...]: _array("q", 1, None),
    tuple[float, ...]: _array("d", 1, None),
    tuple[Gradient, ...]: _array("q", len(Gradient._fields), Gradient),
    tuple[Piece, ...]: _array("q", len(Piece._fields), Piece),
}
_FIELDS: dict[type[Any], list[tuple[_Put, _Take]]] = {
    kind: [_LAYOUTS[layout] for layout in get_type_hints(kind).values()] for kind in KINDS
}
