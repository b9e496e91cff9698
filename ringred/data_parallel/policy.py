"""Policies reduce buckets instead of the all-reduce: the base class of the communication hooks in `ringred.hooks`."""

# No `from __future__ import annotations` here: torch compares a hook's annotations with its own classes.
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ringred.communicator import Communicator
from ringred.data_parallel.lane import Lane
from ringred.errors import ModelMismatch, RingredError
from ringred.runtime.futures import future_of
from ringred.runtime.work import Work
from ringred.transports.base import Counters

__all__ = ["Gradients", "Policy", "comm_hook"]


class Gradients(NamedTuple):
    """The gradients of the `number`-th bucket: `flat`, and `views` of it in the shapes of `parameters`."""

    number: int
    flat: Tensor
    views: list[Tensor]
    parameters: list[Tensor]


class Policy:
    """A way to reduce buckets over the ranks of `comm`, which subclasses implement in `reduce`.

    Reductions run one after the other, on the policy's own thread and communicator, while backward goes on.
    Constructing a policy is collective. Each model needs a policy of its own.
    """

    needs_all_gradients = False
    """Whether the policy must not get a bucket whose gradients may be dropped later, or do not belong to this step."""
    joins = True
    """Whether a rank without inputs can take part with zeros (`join`)."""

    def __init__(self, comm: Communicator) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._lane = Lane(comm, type(self).__name__)
        self._kept: dict[tuple[str, int], tuple[tuple[int, ...] | None, Tensor]] = {}
        self._attached = False

    def reduce(self, comm: Communicator, gradients: Gradients) -> Tensor:
        """Returns the mean of `gradients` over the ranks, flat; it may be `gradients.flat`, which may be changed."""
        raise NotImplementedError

    def attach(self, comm: Communicator, parameters: Sequence[Tensor]) -> None:
        """Attaches the policy to a model, given all its `parameters` and its communicator `comm`. Raises `ValueError`
        if the policy already has a model, or does not fit this one."""
        if self._attached:
            raise ValueError(f"rank {self.rank}: {type(self).__name__} serves a model already; each needs its own")
        if (comm.rank, comm.size) != (self.rank, self.size):
            raise ValueError(
                f"{type(self).__name__} was made for rank {self.rank} of {self.size}, but the model's gradients are "
                f"reduced by rank {comm.rank} of {comm.size}"
            )
        self._attached = True

    def submit(self, gradients: Gradients, purpose: str = "") -> Work[Tensor]:
        """Starts to reduce `gradients`; an exception in `reduce` is raised on every rank, as a `RingredError` that
        says where. `purpose` is as in `Communicator.for_purpose`."""

        def job(comm: Communicator) -> Tensor:
            try:
                return self.reduce(comm, gradients)
            except RingredError:
                raise
            except Exception as failure:
                raise RingredError(
                    f"rank {self.rank}: {type(self).__name__} on bucket {gradients.number}: "
                    f"{type(failure).__name__}: {failure}"
                ) from failure

        return self._lane.submit(job, purpose, gradients.flat.device)

    @property
    def counters(self) -> Counters:
        """Messages and bytes that this rank has sent and received on its communicator so far."""
        return self._lane.comm.counters

    def kept(self, name: str, gradients: Gradients, like: Tensor) -> Tensor:
        """The tensor, shaped like `like`, that the policy keeps under `name` for one bucket from step to step. It
        starts as zeros, and starts again when buckets were laid out anew."""
        members = tuple(id(parameter) for parameter in gradients.parameters)
        key = name, gradients.number
        known = self._kept.get(key)
        if known is None or known[0] not in (members, None) or known[1].shape != like.shape:
            known = members, torch.zeros_like(like)
        if known[1].device != like.device:  # it was loaded from a checkpoint on another device
            known = members, known[1].to(like.device)
        self._kept[key] = members, known[1]
        return known[1]

    def state_dict(self) -> dict[str, Any]:
        """What the policy keeps on this rank, for this rank's checkpoint. Save the model's `bucket_plan` with it,
        because buckets are identified by their numbers."""
        return {"rank": self.rank, "size": self.size, "kept": [(*key, kept) for key, (_, kept) in self._kept.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` returned on this rank. Raises `ModelMismatch` if it comes from another rank."""
        theirs = state_dict["rank"], state_dict["size"]
        if theirs != (self.rank, self.size):
            raise ModelMismatch(
                f"rank {self.rank}: {type(self).__name__}: expected the state of rank {self.rank} of {self.size}, got "
                f"that of rank {theirs[0]} of {theirs[1]}"
            )
        self._kept = {(name, number): (None, kept.clone()) for name, number, kept in state_dict["kept"]}


def comm_hook(state: Policy, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """Reduces `bucket` as the policy `state` does; for `register_comm_hook(state, comm_hook)`."""
    work = state.submit(Gradients(bucket.index(), bucket.buffer(), bucket.gradients(), bucket.parameters()))
    reduced: Future[Tensor] = future_of([work], work.wait, [bucket.buffer().device])
    return reduced
