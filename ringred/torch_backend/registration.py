"""Makes `backend="ringred"` known to torch: its entry point `torch.backends` is called at the end of `import torch`.

Whatever goes wrong in registering must not be the user's, who has only imported torch. (That this module can be
imported at all is up to the installation.)
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
            dist.Backend.register_backend("ringred", _create, extended_api=True, devices=["cpu"])
    except Exception as failure:
        with contextlib.suppress(UserWarning):  # where warnings are errors
            warnings.warn(f"ringred: backend='ringred' is not available: {failure!r}", stacklevel=2)


def _create(options: Any, backend_options: Any = None) -> Any:
    from ringred.torch_backend.group import create

    return create(options, backend_options)
