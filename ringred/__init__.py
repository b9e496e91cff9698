"""ringred: collective communication and data-parallel training for PyTorch.

    comm = ringred.init()                                  # mpirun, torchrun, or one rank
    comm.all_reduce(tensor, "avg", algorithm="torus")      # in place, on every rank the same bits
    model = ringred.DistributedDataParallel(model)         # gradients reduced while backward runs

Collectives: `Communicator`. Algorithms by name: `algorithms("all_reduce")`. Exceptions: `RingredError` and below.
"""

from __future__ import annotations

from ringred.bootstrap import init
from ringred.collectives.registry import algorithms as _algorithms
from ringred.communicator import Communicator
from ringred.ddp import DistributedDataParallel
from ringred.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    GridError,
    ModelMismatch,
    PeerFailed,
    RingredError,
    TransportUnavailable,
    UnknownAlgorithm,
    UnsupportedTensor,
)
from ringred.ops import ReduceOp
from ringred.work import Work

__all__ = [
    "CollectiveMismatch",
    "CollectiveTimeout",
    "Communicator",
    "DistributedDataParallel",
    "GridError",
    "ModelMismatch",
    "PeerFailed",
    "ReduceOp",
    "RingredError",
    "TransportUnavailable",
    "UnknownAlgorithm",
    "UnsupportedTensor",
    "Work",
    "algorithms",
    "init",
]

__version__ = "0.1.0"


def algorithms(collective: str) -> list[str]:
    """The names of the algorithms for `collective` ("all_reduce", "broadcast", ...)."""
    return sorted(_algorithms(collective))
