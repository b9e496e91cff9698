"""The buckets of a model: which parameters share one, and what reduces each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ringred.buckets import Bucket, Entry, SparseBucket, assign
from ringred.communicator import Communicator
from ringred.data_parallel.lane import Lane
from ringred.data_parallel.policy import Policy
from ringred.data_parallel.reductions import (
    CommHook,
    HookReduction,
    PolicyReduction,
    Reduction,
    Share,
    ShareReduction,
    SparseReduction,
)
from ringred.data_parallel.streaming import copier
from ringred.runtime.folds import ReduceOp
from ringred.runtime.select import share_bounds

__all__ = ["Layout", "Members", "Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a DistributedDataParallel. `caps` are the bucket caps in bytes, as `assign` takes them."""

    caps: tuple[int, ...]
    op: ReduceOp = ReduceOp.AVG
    algorithm: str = "auto"
    grid: tuple[int, ...] | None = None
    as_views: bool = False
    find_unused: bool = False
    static_graph: bool = False
    skip_unused: bool = False
    batched_copy: bool = False
    check_finite: bool = False
    deterministic: bool = False
    recovers: bool = False


@dataclass(frozen=True, slots=True)
class Members:
    """The parameters whose gradients are reduced, with their names. `sparse` holds the places (indices in `parameters`)
    of those with sparse gradients. Those at the places `delayed` are reduced when the gradient of `trigger` is
    accumulated, with the gradients that they have by then."""

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    sparse: frozenset[int] = frozenset()
    delayed: tuple[int, ...] = ()
    trigger: Tensor | None = None


class Layout:
    """Buckets in the order in which they are reduced, with the reduction of each.

    They are filled in reverse order of the parameters, unless `plan` gives a list of places for each bucket.
    """

    def __init__(
        self, comm: Communicator, members: Members, settings: Settings, plan: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.comm, self.members, self.settings = comm, members, settings
        self._lane = Lane(comm, "sparse") if members.sparse else None
        self._hook: tuple[Any, CommHook] | None = None
        self._policy: Policy | None = None
        self.shares: list[Share] | None = None
        self.entries = [
            Entry(p.numel() * p.element_size(), (p.dtype, p.device, at if at in members.sparse else None))
            for at, p in enumerate(members.parameters)
        ]
        if plan is None:
            self.lay_out([at for at in reversed(range(len(members.parameters))) if at not in members.delayed])
        else:
            self._build(plan)

    def lay_out(self, order: Sequence[int]) -> None:
        """New buckets, filled in `order`; the buckets of delayed parameters follow that of their trigger."""
        members, caps, entries = self.members, self.settings.caps, self.entries
        assigned = assign(entries, order, caps)
        trigger = next((at for at, parameter in enumerate(members.parameters) if parameter is members.trigger), -1)
        behind = next((n + 1 for n, indices in enumerate(assigned) if trigger in indices), len(assigned))
        self._build([*assigned[:behind], *assign(entries, members.delayed, caps), *assigned[behind:]])

    def set_hook(self, state: Any, hook: CommHook) -> None:
        """From here on `hook` reduces dense buckets."""
        self._hook = state, hook
        self._reductions.clear()

    def set_policy(self, policy: Policy, hook: CommHook | None) -> None:
        """From here on `policy` reduces dense buckets; if `hook` is given, `hook(policy, bucket)` is called for it."""
        self._policy, self._hook = policy, None if hook is None else (policy, hook)
        self._reductions.clear()

    def shard(self, plan: Sequence[Sequence[int]]) -> list[Share]:
        """Lays buckets out as `plan` says; from here on each rank gets only its share of a bucket's result."""
        self.shares = []
        self._build(plan)
        return self.shares

    @property
    def hooked(self) -> bool:
        """Whether a communication hook reduces."""
        return self._hook is not None or self._policy is not None

    @property
    def joins(self) -> bool:
        """Whether a rank without gradients can take part with zeros."""
        return self.shares is None and (self._policy is None or self._policy.joins)

    @property
    def plan(self) -> list[list[int]]:
        """The places of the parameters, bucket by bucket."""
        return [list(bucket.indices) for bucket in self.buckets]

    def reduction(self, number: int, op: ReduceOp) -> Reduction:
        """Returns the object that reduces the `number`-th bucket: by `op`, or by the hook if there is one."""
        known = self._reductions.get((number, op))
        if known is None:
            known = self._reductions[number, op] = self._make(number, op)
        return known

    def _build(self, plan: Sequence[Sequence[int]]) -> None:
        sparse, parameters = self.members.sparse, self.members.parameters
        self.buckets: list[Bucket | SparseBucket] = [
            SparseBucket(indices[0], parameters[indices[0]])
            if indices[0] in sparse
            else Bucket(
                indices,
                parameters,
                partial(self.comm.empty, device=parameters[indices[0]].device),
                copier(sum(parameters[index].nbytes for index in indices)),
            )
            for indices in plan
        ]
        self.place_of = {
            index: (number, place) for number, indices in enumerate(plan) for place, index in enumerate(indices)
        }
        self.delayed = [number for number, indices in enumerate(plan) if indices[0] in self.members.delayed]
        if self.shares is not None:
            self.shares.extend(
                Share(share_bounds(bucket.flat.numel(), self.comm.size), self.comm.rank, bucket.flat)
                for bucket in self.buckets
                if isinstance(bucket, Bucket)
            )
        self._reductions: dict[tuple[int, ReduceOp], Reduction] = {}
        for number in range(len(self.buckets)):
            self.reduction(number, self.settings.op)  # plans are made now, not in the first backward

    def _make(self, number: int, op: ReduceOp) -> Reduction:
        bucket = self.buckets[number]
        if isinstance(bucket, SparseBucket):
            assert self._lane is not None, "there is a lane where there is a sparse bucket"
            return SparseReduction(self._lane, bucket, op)
        parameters = [self.members.parameters[at] for at in bucket.indices]
        if self._hook is not None:
            return HookReduction(*self._hook, bucket, number, number == len(self.buckets) - 1, parameters)
        if self._policy is not None:
            return PolicyReduction(self._policy, bucket, number, parameters)
        settings = self.settings
        if self.shares is not None:
            return ShareReduction(self.comm, bucket, self.shares[number], op, settings.algorithm, settings.grid)
        return self.comm.all_reduce_init(bucket.flat, op, algorithm=settings.algorithm, grid=settings.grid)
