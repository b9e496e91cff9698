"""ringred: collective communication and data-parallel training for PyTorch.

    comm = ringred.init()                                  # mpirun, torchrun, or one rank
    comm.all_reduce(tensor, "avg", algorithm="torus")      # in place; every rank ends with the same bits
    model = ringred.DistributedDataParallel(model)         # gradients reduced while backward runs
    server = ringred.ParameterServer(model, make_optimizer, policy)    # or kept on servers, synchronous or not

Collectives: `Communicator`. Algorithms by name: `algorithms("all_reduce")`. Exceptions: subclasses of `RingredError`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ringred.errors import (
    CollectiveMismatch,
    CollectiveTimeout,
    GridError,
    ModelMismatch,
    NonFiniteGradient,
    PeerFailed,
    PolicyError,
    ReplicasDiverged,
    RingredError,
    TooFewWorkers,
    TransportUnavailable,
    UnknownAlgorithm,
    UnsupportedTensor,
)

if TYPE_CHECKING:
    from ringred.communicator import Communicator, init
    from ringred.data_parallel.elastic import Elastic
    from ringred.data_parallel.sampling import ElasticSampler
    from ringred.data_parallel.sync_batchnorm import SyncBatchNorm
    from ringred.ddp import DistributedDataParallel
    from ringred.parameter_server.training import ParameterServer
    from ringred.runtime.folds import ReduceOp
    from ringred.runtime.work import Work

__all__ = [
    "CollectiveMismatch",
    "CollectiveTimeout",
    "Communicator",
    "DistributedDataParallel",
    "Elastic",
    "ElasticSampler",
    "GridError",
    "ModelMismatch",
    "NonFiniteGradient",
    "ParameterServer",
    "PeerFailed",
    "PolicyError",
    "ReduceOp",
    "ReplicasDiverged",
    "RingredError",
    "SyncBatchNorm",
    "TooFewWorkers",
    "TransportUnavailable",
    "UnknownAlgorithm",
    "UnsupportedTensor",
    "Work",
    "algorithms",
    "init",
]

__version__ = "0.1.0"

# Imported on first use: schedules, topologies and their tools work without torch, and without importing it they start
# in milliseconds.
_LAZY = {
    "Communicator": "ringred.communicator",
    "DistributedDataParallel": "ringred.ddp",
    "Elastic": "ringred.data_parallel.elastic",
    "ElasticSampler": "ringred.data_parallel.sampling",
    "ParameterServer": "ringred.parameter_server.training",
    "ReduceOp": "ringred.runtime.folds",
    "SyncBatchNorm": "ringred.data_parallel.sync_batchnorm",
    "Work": "ringred.runtime.work",
    "init": "ringred.communicator",
}
_SUBMODULES = {
    "checkpoint": "ringred.data_parallel.checkpoint",
    "hooks": "ringred.hooks",
    "optim": "ringred.optim",
    "parameter_server": "ringred.parameter_server",
    "reports": "ringred.data_parallel.reports",
    "torch_backend": "ringred.torch_backend",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(_SUBMODULES[name])
    if name not in _LAZY:
        raise AttributeError(f"module 'ringred' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


def algorithms(collective: str) -> list[str]:
    """The names of the algorithms for `collective` ("all_reduce", "broadcast", ...)."""
    from ringred.collectives import registry

    return sorted(registry.algorithms(collective))
