"""Makes `backend="ringred"` known to torch: its entry point `torch.backends` is called at the end of `import torch`.

An error while registering must not reach the user, who has only imported torch. (Whether this module itself can be
imported depends on the installation.)
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

__all__ = ["register"]


def register() -> None:
    """Registers the backend once. Never raises."""
    try:
        import torch.distributed as dist

        if dist.is_available() and "RINGRED" not in dist.Backend._plugins:
            dist.Backend.register_backend("ringred", _create, extended_api=True, devices=["cpu", "cuda"])
    except Exception as failure:
        with contextlib.suppress(UserWarning):  # where warnings are errors
            warnings.warn(f"ringred: backend='ringred' is not available: {failure!r}", stacklevel=2)


def _create(options: Any, backend_options: Any = None) -> Any:
    from ringred.torch_backend.group import create

    return create(options, backend_options)
