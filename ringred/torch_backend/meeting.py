"""A barrier that names the ranks that did not come. Ranks meet through the store, because a collective might hang."""

from __future__ import annotations

import time
from typing import Any

from ringred.errors import CollectiveTimeout

__all__ = ["meet"]

_LOOK_SECONDS = 0.002  # between two looks into the store
_VERDICT_SECONDS = 1.0  # how much longer than rank 0 the others wait for its list of missing ranks


def meet(store: Any, rank: int, size: int, seconds: float, name_all: bool) -> None:
    """Returns once all `size` ranks have called it, with a `store` that nothing else uses.

    Raises `CollectiveTimeout` after `seconds`; its message names the first missing rank, or all, and lists all of them.
    """
    where, took = f"rank {rank}: monitored_barrier", f"in {seconds * 1000:.0f} ms"
    began = time.monotonic()
    store.set(f"came/{rank}", "")
    if rank == 0:
        if seconds <= 0:
            raise CollectiveTimeout(f"{where}: Rank 0 timed out in monitoredBarrier: no time was given")
        missing = list(range(1, size))
        while missing and time.monotonic() - began < seconds:
            missing = [peer for peer in missing if not store.check([f"came/{peer}"])]
            time.sleep(_LOOK_SECONDS if missing else 0)
        named = ", ".join(map(str, missing))
        store.set("verdict", named or "all")
        if missing:
            first = f"Ranks {named}" if name_all else f"Rank {missing[0]}"
            raise CollectiveTimeout(f"{where}: {first} failed to pass monitoredBarrier {took}; missing: {named}")
        return
    while not store.check(["verdict"]) and time.monotonic() - began < seconds + _VERDICT_SECONDS:
        time.sleep(_LOOK_SECONDS)
    named = store.get("verdict").decode() if store.check(["verdict"]) else "0"
    if named != "all":
        raise CollectiveTimeout(
            f"{where}: Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for "
            f"send/recv from rank 0 {took}; missing: {named}"
        )
