"""K-async: the first K workers make an update; the others go on, and push stale gradients later."""

from __future__ import annotations

from ringred.parameter_server.policies.policy import FirstK

__all__ = ["KAsync"]


class KAsync(FirstK):
    """A worker that has pushed waits for the update; nothing is thrown away.

    Mini-batch times exponential with rate μ: time per update (H_P − H_{P−K})/μ, mean staleness P/K − 1.
    """

    name = "k_async"
    finisher_waits = True
    others_cancelled = False
