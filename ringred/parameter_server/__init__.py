"""Parameters on servers: synchronous, asynchronous and everything between.

`ringred.ParameterServer` trains a model; `Store` holds keys and values; `policies` say who is waited for, and
`simulate` runs them in simulated time. `Hogwild` shares parameters between processes of one host without a server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringred.parameter_server.hogwild import Hogwild
    from ringred.parameter_server.hosting import Placement
    from ringred.parameter_server.keys import Keys, load_keys, make_keys, save_keys
    from ringred.parameter_server.report import Report
    from ringred.parameter_server.snapshots import read_snapshot
    from ringred.parameter_server.store import Store
    from ringred.parameter_server.training import ParameterServer

__all__ = [
    "Hogwild",
    "Keys",
    "ParameterServer",
    "Placement",
    "Report",
    "Store",
    "load_keys",
    "make_keys",
    "read_snapshot",
    "save_keys",
]

# Imported on first use: policies and their simulator need neither torch nor ZeroMQ.
_LAZY = {
    "Hogwild": "hogwild",
    "Keys": "keys",
    "ParameterServer": "training",
    "Placement": "hosting",
    "Report": "report",
    "Store": "store",
    "load_keys": "keys",
    "make_keys": "keys",
    "read_snapshot": "snapshots",
    "save_keys": "keys",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ringred.parameter_server' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"ringred.parameter_server.{_LAZY[name]}"), name)
    return value
