"""K-batch-sync: the first K mini-batches at the same parameters make an update, whoever computed them."""

from __future__ import annotations

from ringred.parameter_server.policies.policy import FirstK

__all__ = ["KBatchSync"]


class KBatchSync(FirstK):
    """A worker that has pushed starts its next mini-batch at the same parameters; an update cancels all in progress.

    No gradient is stale. Time per update, mini-batch times exponential with rate μ: K/(Pμ).
    """

    name = "k_batch_sync"
    finisher_waits = False
    others_cancelled = True
