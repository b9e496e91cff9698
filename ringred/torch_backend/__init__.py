"""`backend="ringred"` for torch.distributed.

`import torch` imports this package to register the backend, so its modules are loaded only when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringred.torch_backend.group import monitored_barrier
    from ringred.torch_backend.registration import register

__all__ = ["monitored_barrier", "register"]

_LAZY = {"monitored_barrier": "ringred.torch_backend.group", "register": "ringred.torch_backend.registration"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ringred.torch_backend' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
