"""The compiled player, where it was built with this package: `player`, or None and the `reason`.

What it does is written in Python as well; without it everything works, and small and 16-bit messages take longer.
`RINGRED_NATIVE=off` goes without.
"""

from __future__ import annotations

import os
from types import ModuleType

__all__ = ["player", "reason"]

player: ModuleType | None = None
reason = "RINGRED_NATIVE=off"
if os.environ.get("RINGRED_NATIVE") != "off":
    try:
        from ringred.native import _player  # type: ignore[attr-defined]
    except ImportError as failure:
        reason = f"not built: {failure}"
    else:
        player, reason = _player, ""
