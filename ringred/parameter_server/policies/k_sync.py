"""K-sync: the first K of P workers make an update; the others' mini-batches are thrown away."""

from __future__ import annotations

from ringred.parameter_server.policies.policy import FirstK

__all__ = ["KSync"]


class KSync(FirstK):
    """Waits for K workers and cancels the rest, so that no gradient is stale and the slowest P − K are not waited for.

    Time per update, mini-batch times exponential with rate μ: (H_P − H_{P−K})/μ, variance Σ_{i=P−K+1..P} 1/(iμ)².
    """

    name = "k_sync"
    finisher_waits = True
    others_cancelled = True
