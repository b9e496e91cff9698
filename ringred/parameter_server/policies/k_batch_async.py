"""K-batch-async: any K mini-batches make an update; no worker ever waits."""

from __future__ import annotations

from ringred.parameter_server.policies.policy import FirstK

__all__ = ["KBatchAsync"]


class KBatchAsync(FirstK):
    """A worker that has pushed takes the parameters of that moment and goes on.

    Time per update K·E[X]/P for any distribution of mini-batch times X; mean staleness (P − 1)/K.
    """

    name = "k_batch_async"
    finisher_waits = False
    others_cancelled = False
