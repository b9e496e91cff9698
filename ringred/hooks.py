"""Communication hooks for torch's own DistributedDataParallel, whatever its process group is."""

# No annotations from the future here: torch compares those of a hook with its own classes.
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ringred.communicator import Communicator
from ringred.futures import future_of
from ringred.ops import ReduceOp

__all__ = ["all_reduce_hook"]


def all_reduce_hook(comm: Communicator, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """Averages the gradients of `bucket` over the ranks of `comm`.

        model = torch.nn.parallel.DistributedDataParallel(module)      # its process group may stay Gloo or NCCL
        model.register_comm_hook(ringred.init(), ringred.hooks.all_reduce_hook)

    Returns a future of the bucket's flat buffer, of which gradients are views; it fails as the
    all-reduce does. `comm` must have the ranks of the model's process group, in their order. CPU tensors.
    """
    gradients: Tensor = bucket.buffer()
    work = comm.all_reduce(gradients, ReduceOp.AVG, async_op=True)

    def averaged() -> Tensor:
        work.wait()
        return gradients

    reduced: Future[Tensor] = future_of([work], averaged)
    return reduced
