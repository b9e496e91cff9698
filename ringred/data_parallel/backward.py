"""One backward: copies gradients into buckets, reduces full buckets, and gives the results to the parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringred.buckets import Bucket, SparseBucket
from ringred.data_parallel.layout import Layout
from ringred.data_parallel.recovery import RECOVERABLE
from ringred.data_parallel.reductions import Failed, InFlight, Nothing
from ringred.errors import NonFiniteGradient, UnsupportedTensor
from ringred.runtime.folds import ReduceOp

__all__ = ["Backward", "Forward"]

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(slots=True)
class Forward:
    """One forward whose backward is reduced: `unused` are the places of the parameters that its outputs do not depend
    on, `scale()` returns the factor for its gradients, and `reduced` is whether a backward of it was reduced already.
    """

    unused: Sequence[int] = ()
    scale: Callable[[], float] | None = None
    reduced: bool = False


class Backward:
    """A running backward of `forward`, with the buckets of `layout`. `purpose` is its name in errors and contracts.

    `left` counts the gradients that are still to come for each parameter. `used` are the places of the parameters that
    had a gradient since the last reduction; with `asks_for_use` the ranks combine theirs. `on_launched` is called once
    the reductions of all buckets have been started.
    """

    def __init__(
        self,
        layout: Layout,
        forward: Forward,
        firings: Sequence[int],
        used: set[int],
        *,
        asks_for_use: bool,
        on_launched: Callable[[], None],
    ) -> None:
        self.layout, self.forward, self.left = layout, forward, list(firings)
        self.touched = False  # a gradient has come
        self.purpose = ""
        self.order: list[int] = []
        """The places of the parameters, as they became ready."""
        self.ready_ns, self.full_ns = [0] * len(firings), [0] * len(layout.buckets)
        self.works: list[InFlight] = []
        self.used_somewhere: Tensor | None = None
        self._used, self._asks_for_use, self._on_launched = used, asks_for_use, on_launched
        self._behind: list[InFlight] = []
        self._scale_failed: BaseException | None = None
        self._found: Tensor | None = None
        self._non_finite = -1, 0, 0
        for bucket in layout.buckets:
            bucket.missing = len(bucket.indices)
        for number in layout.delayed:
            layout.buckets[number].missing = 1

    def fill_delayed(self) -> None:
        """Copies the gradients that the delayed parameters have by now into their buckets."""
        for number in self.layout.delayed:
            bucket = self.layout.buckets[number]
            if bucket.missing:
                self._used.update(at for at in bucket.indices if self.layout.members.parameters[at].grad is not None)
                self._put_all(bucket)
                bucket.missing = 0
                self.full_ns[number] = time.monotonic_ns()
        self._launch_full()

    def ready(self, at: int) -> None:
        """Marks the parameter at place `at` as ready: its gradient is complete, or none will come."""
        self.order.append(at)
        number, place = self.layout.place_of[at]
        bucket = self.layout.buckets[number]
        batched = self.layout.settings.batched_copy
        if not batched:
            self._put(at, bucket, place)
        self.ready_ns[at] = time.monotonic_ns()
        bucket.missing -= 1
        if bucket.missing == 0:
            if batched:
                self._put_all(bucket)
            self.full_ns[number] = self.ready_ns[at]
            self._launch_full()

    def _put(self, at: int, bucket: Bucket | SparseBucket, place: int) -> None:
        """Copies a gradient into its bucket at once: it is still in the cache. If gradients are views of the bucket,
        its own memory is then free for the next gradient."""
        parameter = self.layout.members.parameters[at]
        # An unused parameter may hold a gradient from earlier passes; without one it counts as zeros.
        gradient = parameter.grad
        if gradient is not None:
            self._check_gradient(at, gradient, bucket)
        scale = self._scale()
        # With a factor of 0 the gradient is not read at all: it may be NaN.
        bucket.put(place, None if scale == 0.0 else gradient, scale)
        if gradient is not None and self.layout.settings.as_views and isinstance(bucket, Bucket):
            parameter.grad = bucket.views[place]

    def _scale(self) -> float | None:
        try:
            return None if self.forward.scale is None else self.forward.scale()
        except RECOVERABLE as failure:
            if not self.layout.settings.recovers:
                raise
            self._scale_failed = failure  # heard of when the results are waited for
            return None

    def _put_all(self, bucket: Bucket | SparseBucket) -> None:
        given = [self.layout.members.parameters[at].grad for at in bucket.indices]
        gradients = [gradient.detach() for gradient in given if gradient is not None]
        plain = isinstance(bucket, Bucket) and self.forward.scale is None and not self.layout.settings.as_views
        if not plain or len(gradients) < len(given):
            for place, at in enumerate(bucket.indices):
                self._put(at, bucket, place)
            return
        for at, gradient in zip(bucket.indices, gradients, strict=True):
            self._check_gradient(at, gradient, bucket)
        torch._foreach_copy_(bucket.views, gradients)

    def _check_gradient(self, at: int, gradient: Any, bucket: Bucket | SparseBucket) -> None:
        sparse, dtype = isinstance(bucket, SparseBucket), bucket.dtype
        alike = gradient.layout == torch.strided if not sparse else gradient.is_sparse and gradient.sparse_dim() == 1
        if alike and gradient.dtype == dtype:
            return
        where = f"rank {self.layout.comm.rank}: parameter {self.layout.members.names[at]!r}"
        if gradient.dtype != dtype:
            raise UnsupportedTensor(
                f"{where}: expected a gradient of {dtype}, got {gradient.dtype}: the module was converted after "
                "DistributedDataParallel was constructed. Construct it anew"
            )
        raise UnsupportedTensor(
            f"{where}: expected a {'gradient of sparse rows' if sparse else 'dense gradient'}, got {gradient.layout}; "
            "sparse ones are expected of torch.nn.Embedding and EmbeddingBag that had sparse=True at construction"
        )

    def _launch_full(self) -> None:
        """Starts the reduction of full buckets, in the order in which all ranks do."""
        buckets = self.layout.buckets
        while len(self.works) < len(buckets) and buckets[len(self.works)].missing == 0:
            bucket = buckets[len(self.works)]
            if self.layout.settings.check_finite:
                self._note_non_finite(bucket)
            if self.layout.settings.skip_unused and self._used.isdisjoint(bucket.indices):
                self.works.append(Nothing())
            else:
                op = self.layout.settings.op if self.forward.scale is None else ReduceOp.SUM
                number = len(self.works)
                self.works.append(self._started(lambda: self._start(number, op)))  # noqa: B023  # called at once
            if len(self.works) == len(buckets):
                self._launch_behind()
                self._on_launched()

    def _launch_behind(self) -> None:
        """Starts the collectives after the last bucket: which parameters were used, which gradients were not finite."""
        if self._asks_for_use:
            self.used_somewhere = torch.zeros(len(self.left), dtype=torch.uint8)
            self.used_somewhere[list(self._used)] = 1
            used = self.used_somewhere
            self._behind.append(self._started(lambda: self.layout.comm.all_reduce(used, ReduceOp.MAX, async_op=True)))
        if self.layout.settings.check_finite:
            found = self._found = torch.empty(3 * self.layout.comm.size, dtype=torch.int64)
            mine = torch.tensor(self._non_finite)
            self._behind.append(self._started(lambda: self.layout.comm.all_gather(found, mine, async_op=True)))

    def _start(self, number: int, op: ReduceOp) -> InFlight:
        return self.layout.reduction(number, op).start(f"bucket {number} of {self.purpose}")

    def _started(self, start: Callable[[], InFlight | None]) -> InFlight:
        """What `start` started. If the ranks go on after failures, one of now is heard of when the result is waited
        for: in the middle of backward it would end that."""
        try:
            work = start()
        except RECOVERABLE as failure:
            if not self.layout.settings.recovers:
                raise
            return Failed(failure)
        assert work is not None, "asynchronous calls return their work"
        return work

    def again(self) -> None:
        """Starts the reductions of all buckets, from the gradients that the parameters have."""
        for number, bucket in enumerate(self.layout.buckets):
            for place, at in enumerate(bucket.indices):
                self._put(at, bucket, place)
            bucket.missing = 0
            self.full_ns[number] = time.monotonic_ns()
        self._launch_full()

    def _note_non_finite(self, bucket: Bucket | SparseBucket) -> None:
        """If a gradient holds NaN or infinity, notes it and zeroes the bucket, so that no other rank receives them."""
        values = bucket.values
        # A sum is finite only if all elements are. It may also overflow, so then the elements are checked themselves.
        if math.isfinite(abs(values.sum(dtype=_WIDE.get(values.dtype)).item())) or torch.isfinite(values).all():
            return
        for at, view in zip(bucket.indices, bucket.views, strict=True):
            nans, others = int(torch.isnan(view).sum()), int(torch.isinf(view).sum())
            if (nans or others) and self._non_finite[0] < 0:
                self._non_finite = at, nans, others
        values.zero_()

    def launch_zeros(self, op: ReduceOp) -> None:
        """Reduces zeros in the place of gradients that this rank does not have."""
        for number, bucket in enumerate(self.layout.buckets):
            for place in range(len(bucket.indices)):
                bucket.put(place, None)
            self.works.append(self._start(number, op))
        self._launch_behind()

    def wait(self) -> None:
        """Waits for all reductions, even after a failure, because they use the buckets; raises the first failure."""
        failures = [] if self._scale_failed is None else [self._scale_failed]
        for work in (*self.works, *self._behind):
            try:
                work.wait()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    def described(self) -> tuple[list[int], list[int], list[str]]:
        """The bytes of each bucket, its number of parameters, and how it was reduced."""
        buckets, layout = self.layout.buckets, self.layout
        algorithms = [
            "skipped" if isinstance(work, Nothing) else layout.reduction(at, layout.settings.op).algorithm
            for at, work in enumerate(self.works)
        ]
        return [bucket.nbytes for bucket in buckets], [len(bucket.indices) for bucket in buckets], algorithms

    def raise_non_finite(self) -> None:
        """If a gradient of any rank was not finite, drops all of them and raises `NonFiniteGradient` on every rank."""
        if self._found is None:
            return
        rows = self._found.view(self.layout.comm.size, 3).tolist()
        texts = [
            f"that of {self.layout.members.names[at]!r} on rank {rank} ({nans} NaN, {infinite} infinite)"
            for rank, (at, nans, infinite) in enumerate(rows)
            if at >= 0
        ]
        if texts:
            # No optimizer step may use gradients that are reduced in part, or on this rank alone.
            for parameter in self.layout.members.parameters:
                parameter.grad = None
            for share in self.layout.shares or ():
                share.holds = False
            raise NonFiniteGradient(
                f"rank {self.layout.comm.rank}: expected finite gradients, but not finite is {'; '.join(texts)}. "
                "It went to no other rank; all gradients of this backward are dropped"
            )

    def hand_out(self, used: Tensor | None) -> None:
        """Gives every parameter its reduced gradient; a parameter that no rank used, by `used`, keeps its own."""
        if self.layout.shares is not None:
            for parameter in self.layout.members.parameters:
                parameter.grad = None  # reduced, it lies in the ranks' shares
            return
        parameters, as_views = self.layout.members.parameters, self.layout.settings.as_views
        targets, sources = [], []
        for bucket, work in zip(self.layout.buckets, self.works, strict=True):
            if isinstance(work, Nothing):
                continue
            if isinstance(bucket, SparseBucket):
                if used is None or used[bucket.indices[0]]:
                    parameters[bucket.indices[0]].grad = bucket.gradient
                continue
            for index, view in zip(bucket.indices, bucket.views, strict=True):
                if used is not None and not used[index]:
                    continue
                parameter = parameters[index]
                if parameter.grad is None:
                    parameter.grad = view if as_views else view.clone()
                elif not as_views:
                    targets.append(parameter.grad.detach())
                    sources.append(view)
        if targets:
            torch._foreach_copy_(targets, sources)
