"""Who is waited for, what is applied, who is cancelled: each policy of the parameter server in a file of its own."""

from __future__ import annotations

from ringred.errors import PolicyError, nearest
from ringred.parameter_server.policies.asynchronous import Async
from ringred.parameter_server.policies.bounded_staleness import BoundedStaleness
from ringred.parameter_server.policies.k_async import KAsync
from ringred.parameter_server.policies.k_batch_async import KBatchAsync
from ringred.parameter_server.policies.k_batch_sync import KBatchSync
from ringred.parameter_server.policies.k_sync import KSync
from ringred.parameter_server.policies.policy import Decision, Gradient, Policy
from ringred.parameter_server.policies.soft_sync import SoftSync
from ringred.parameter_server.policies.sync import Sync

__all__ = [
    "POLICIES",
    "Async",
    "BoundedStaleness",
    "Decision",
    "Gradient",
    "KAsync",
    "KBatchAsync",
    "KBatchSync",
    "KSync",
    "Policy",
    "SoftSync",
    "Sync",
    "parse",
]

_PLAIN: dict[str, type[Sync] | type[Async]] = {policy.name: policy for policy in (Sync, Async)}
_COUNTED: dict[str, type[KSync | KBatchSync | KAsync | KBatchAsync | SoftSync | BoundedStaleness]] = {
    policy.name: policy for policy in (KSync, KBatchSync, KAsync, KBatchAsync, SoftSync, BoundedStaleness)
}
POLICIES: dict[str, type[Policy]] = {**_PLAIN, **_COUNTED}
"""The policies by name."""


def parse(text: str, *, elastic: bool = False) -> Policy:
    """The policy that a command line names: `sync`, `async`, or with its number `k_async:3`, `soft_sync:1`.

    Raises `PolicyError` for an unknown name, and for a number that is missing, too many or out of range.
    """
    name, colon, number = text.partition(":")
    if name not in POLICIES:
        raise PolicyError(f"no policy is called {name!r}{nearest(name, POLICIES)}; there are {', '.join(POLICIES)}")
    if name in _PLAIN:
        if colon:
            raise PolicyError(f"{text!r}: the policy {name} takes no number")
        return _PLAIN[name](elastic=elastic)
    try:
        return _COUNTED[name](int(number), elastic=elastic)
    except ValueError as failure:
        raise PolicyError(f"{text!r}: the policy {name} takes a number, as in {name}:2 ({failure})") from None
