"""Tools to test programs, transports and an installation with: public, and what ringred's own tests and command use.

The command (`command`) needs no torch for most of what it does: so the tools that do are loaded when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringred.testing.ranks import Faulty, run_ranks

__all__ = ["Faulty", "run_ranks"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ringred.testing' has no attribute {name!r}")
    return getattr(importlib.import_module("ringred.testing.ranks"), name)
