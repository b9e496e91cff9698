"""The compiled player, where it was built with this package: `player`, or None and the `reason`.

What it does is written in Python as well; without it everything works, and small and 16-bit messages take longer.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["VERSION", "player", "reason"]

VERSION = 9
"""Of what lies where and of the functions of the extension, as in `layout.h`."""

player: ModuleType | None = None
reason = ""
try:
    _player = import_module("ringred.native._player")
except ImportError as failure:
    reason = f"it was not built, or does not fit this Python: {failure}"
else:
    if _player.layout()[0] == VERSION:
        player = _player
    else:
        reason = "it was built for another version of ringred; install ringred again"
