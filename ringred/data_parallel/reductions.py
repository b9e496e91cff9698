"""How one bucket is reduced over the ranks: by an all-reduce, by a communication hook, or as sparse rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ringred.buckets import Bucket, SparseBucket
from ringred.communicator import Communicator
from ringred.data_parallel.lane import Lane
from ringred.data_parallel.policy import Gradients, Policy
from ringred.runtime.folds import ReduceOp
from ringred.runtime.work import Work

__all__ = [
    "SPARSE_ROWS",
    "CommHook",
    "Failed",
    "GradBucket",
    "HookReduction",
    "InFlight",
    "Nothing",
    "PolicyReduction",
    "Reduction",
    "Share",
    "ShareReduction",
    "SparseReduction",
]

SPARSE_ROWS = "gathered rows"
"""How sparse gradients are reduced."""

CommHook = Callable[[Any, Any], Any]
"""`hook(state, bucket)`, which returns a `torch.futures.Future` of the bucket's reduced gradients, flat."""


class InFlight(Protocol):
    """A reduction that was started; times are of `time.monotonic_ns`."""

    started_ns: int

    @property
    def ended_ns(self) -> int:
        """When it was done."""

    def wait(self) -> Any:
        """Returns once the bucket holds the result; raises what the reduction failed with."""


class Reduction(Protocol):
    """Reduces one bucket again and again: `PersistentAllReduce`, or one of the classes below."""

    @property
    def algorithm(self) -> str:
        """The name of the method, for reports."""

    def start(self, purpose: str) -> InFlight:
        """Starts to reduce the bucket's contents; ranks with different `purpose`s must not be reduced together."""


class Nothing:
    """A reduction that is skipped: it is complete from the start."""

    def __init__(self) -> None:
        self.started_ns = self.ended_ns = time.monotonic_ns()

    def wait(self) -> None:
        pass


class Failed:
    """A reduction that could not be started."""

    def __init__(self, failure: BaseException) -> None:
        self.started_ns = self.ended_ns = time.monotonic_ns()
        self._failure = failure

    def wait(self) -> None:
        raise self._failure


class GradBucket:
    """A bucket as communication hooks see it: `torch.distributed.GradBucket`, method by method."""

    def __init__(self, bucket: Bucket, index: int, is_last: bool, parameters: Sequence[Tensor]) -> None:
        self._bucket, self._index, self._is_last = bucket, index, is_last
        self._parameters = list(parameters)
        self._buffer = bucket.flat

    def index(self) -> int:
        """Its number, in the order in which buckets are reduced."""
        return self._index

    def is_last(self) -> bool:
        """Whether no bucket follows in this backward."""
        return self._is_last

    def buffer(self) -> Tensor:
        """This rank's gradients in one 1-D tensor, not divided by the number of ranks."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Puts another tensor in the place of the buffer."""
        self._buffer = buffer

    def gradients(self) -> list[Tensor]:
        """The gradients as views of the buffer, in the shapes of the parameters."""
        return self._bucket.views_in(self._buffer)

    def parameters(self) -> list[Tensor]:
        """The parameters, in the order of `gradients`."""
        return list(self._parameters)


class HookReduction:
    """Reduces `bucket`, the `index`-th, by calling `hook(state, GradBucket)`, on the thread that runs backward."""

    def __init__(
        self, state: Any, hook: CommHook, bucket: Bucket, index: int, is_last: bool, parameters: Sequence[Tensor]
    ) -> None:
        self._state, self._hook, self._bucket = state, hook, bucket
        self._place = index, is_last, parameters
        self.algorithm = getattr(hook, "__qualname__", type(hook).__name__)

    def start(self, purpose: str) -> InFlight:
        future = self._hook(self._state, GradBucket(self._bucket, *self._place))
        return _Hooked(future, self._bucket.flat, self.algorithm)


class PolicyReduction:
    """Reduces `bucket`, the `index`-th, by a policy, as `comm_hook` would, but without a torch future."""

    def __init__(self, policy: Policy, bucket: Bucket, index: int, parameters: Sequence[Tensor]) -> None:
        self._policy = policy
        self._gradients = Gradients(index, bucket.flat, bucket.views, list(parameters))
        self.algorithm = type(policy).__name__

    def start(self, purpose: str) -> InFlight:
        return _ByPolicy(self._policy.submit(self._gradients, purpose), self._gradients.flat)


class _ByPolicy:
    """A policy's job under way."""

    def __init__(self, work: Work[Tensor], flat: Tensor) -> None:
        self._work, self._flat = work, flat
        self.started_ns = self.ended_ns = 0

    @property
    def rest(self) -> Any:
        """As of `Work`."""
        return self._work.rest

    def wait(self) -> None:
        result = self._work.wait()
        self.started_ns, self.ended_ns = self._work.started_ns, self._work.ended_ns
        if result.data_ptr() != self._flat.data_ptr():
            self._flat.copy_(result)


class _Hooked:
    """The future that a hook returned."""

    def __init__(self, future: Any, flat: Tensor, hook: str) -> None:
        self.started_ns, self.ended_ns = time.monotonic_ns(), 0
        self._flat, self._hook = flat, hook
        if not isinstance(future, torch._C.Future):
            raise TypeError(f"communication hook {hook}: expected a torch.futures.Future, got {type(future).__name__}")
        self._future: Any = future
        future.add_done_callback(self._note_end)

    def _note_end(self, future: Any) -> None:
        self.ended_ns = time.monotonic_ns()

    def wait(self) -> None:
        result = self._future.wait()
        self.ended_ns = self.ended_ns or time.monotonic_ns()
        if isinstance(result, (list, tuple)) and len(result) == 1:
            result = result[0]  # futures of torch.distributed hold a list of tensors
        if not isinstance(result, Tensor) or result.numel() != self._flat.numel():
            got = f"{result.numel()} elements" if isinstance(result, Tensor) else type(result).__name__
            raise TypeError(
                f"communication hook {self._hook}: expected its future to hold a tensor of {self._flat.numel()} "
                f"elements, got {got}"
            )
        if result.data_ptr() != self._flat.data_ptr():
            self._flat.copy_(result.detach().reshape(-1))


class Share:
    """This rank's share of a bucket whose result is split over the ranks. `bounds[r]` is the (begin, end) of rank r's
    share, and `gradient` the reduced gradient of this rank's, where the bucket's `flat` is. `holds` is whether it is
    valid, so that the next result is added to it."""

    def __init__(self, bounds: Sequence[tuple[int, int]], rank: int, flat: Tensor) -> None:
        self.bounds = list(bounds)
        self.own = self.bounds[rank]
        self.gradient = flat.new_zeros(self.own[1] - self.own[0])
        self.holds = False


class ShareReduction:
    """Reduces a bucket by a reduce-scatter: each rank gets only its share of the sum or mean."""

    def __init__(
        self,
        comm: Communicator,
        bucket: Bucket,
        share: Share,
        op: ReduceOp,
        algorithm: str,
        grid: Sequence[int] | None,
    ) -> None:
        self._comm, self._share, self._op, self._asked = comm, share, op, (algorithm, grid)
        self._parts = [bucket.flat[lo:hi] for lo, hi in share.bounds]
        self.algorithm = "reduce_scatter"

    def start(self, purpose: str) -> InFlight:
        share = self._share
        before = share.gradient.clone() if share.holds else None
        with self._comm.for_purpose(purpose):
            work = self._scattered()
        assert work is not None, "asynchronous calls return their work"
        return _Scattering(work, share, before)

    def _scattered(self) -> Work[None] | None:
        share = self._share
        return self._comm.reduce_scatter(
            share.gradient, self._parts, self._op, algorithm=self._asked[0], grid=self._asked[1], async_op=True
        )


class _Scattering:
    """A reduce-scatter under way; what the share held `before` is added to its result."""

    def __init__(self, work: Work[None], share: Share, before: Tensor | None) -> None:
        self._work, self._share, self._before = work, share, before
        self.started_ns = self.ended_ns = 0

    @property
    def rest(self) -> Any:
        """As of `Work`."""
        return self._work.rest

    def wait(self) -> None:
        self._work.wait()
        self.started_ns, self.ended_ns = self._work.started_ns, self._work.ended_ns
        if self._before is not None:
            self._share.gradient += self._before
            self._before = None
        self._share.holds = True


class SparseReduction:
    """Adds sparse gradients row by row, on `lane`: all ranks gather the rows that any of them has."""

    algorithm = SPARSE_ROWS

    def __init__(self, lane: Lane, bucket: SparseBucket, op: ReduceOp) -> None:
        self._lane, self._bucket, self._op = lane, bucket, op

    def start(self, purpose: str) -> InFlight:
        bucket, op = self._bucket, self._op

        def job(comm: Communicator) -> Tensor:
            assert bucket.gradient is not None, "a bucket is full when its reduction starts"
            bucket.gradient = _sum_rows(comm, bucket.gradient, op)
            return bucket.gradient

        return self._lane.submit(job, purpose, bucket.values.device)


def _sum_rows(comm: Communicator, gradient: Tensor, op: ReduceOp) -> Tensor:
    """The sum or mean of the ranks' coalesced sparse tensors, added in rank order."""
    rows, values = gradient.indices()[0].contiguous(), gradient.values().contiguous()
    counts = torch.empty(comm.size, dtype=torch.int64)
    comm.all_gather(counts, torch.tensor([rows.numel()]))
    width = values.shape[1:]
    all_rows = [rows.new_empty(count) for count in counts.tolist()]
    all_values = [values.new_empty((count, *width)) for count in counts.tolist()]
    comm.all_gather(all_rows, rows)
    comm.all_gather(all_values, values)
    present, places = torch.unique(torch.cat(all_rows), return_inverse=True)
    total = values.new_zeros((present.numel(), *width))
    for place, part in zip(places.split(counts.tolist()), all_values, strict=True):
        total.index_add_(0, place, part)
    if op is ReduceOp.AVG:
        total /= comm.size
    return torch.sparse_coo_tensor(
        present.unsqueeze(0), total, gradient.shape, is_coalesced=True, check_invariants=False
    )
