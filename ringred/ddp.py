"""DistributedDataParallel: a module whose gradients are reduced over the ranks while backward goes on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ringred.communicator import Communicator, default_communicator
from ringred.data_parallel import arguments
from ringred.data_parallel.arguments import BucketPlan
from ringred.data_parallel.as_given import AsGiven
from ringred.data_parallel.going_on import GoingOn, next_name
from ringred.data_parallel.join import UnevenInputs, check_joinable
from ringred.data_parallel.layout import Members, Settings
from ringred.data_parallel.moving import moved
from ringred.data_parallel.policy import Policy, comm_hook
from ringred.data_parallel.recovery import Recovery
from ringred.data_parallel.reducer import Reducer
from ringred.data_parallel.reductions import CommHook
from ringred.data_parallel.replicas import broadcast_tensors, check_same_model
from ringred.data_parallel.reporting import Reporting
from ringred.data_parallel.weights import Weights
from ringred.runtime.compiling import active_ddp_module, compiled_in_buckets, not_compiled
from ringred.runtime.folds import ReduceOp

__all__ = ["DistributedDataParallel"]


class DistributedDataParallel(nn.Module, GoingOn, Reporting):
    """Trains `module` on every rank with the gradients averaged over all ranks: torch's DDP over ringred.

    Parameters and buffers of rank 0 are copied to all ranks at the start (`init_sync`), after a check that all
    ranks built the same model (`ModelMismatch` names what differs, on every rank). In backward a gradient is
    ready when it is accumulated; gradients fill buckets of `bucket_cap_mb` MiB (if None: 1 MiB for the
    first bucket, 25 MiB for the others). The first iteration fills them in reverse order of the parameters, later
    iterations in the order in which rank 0's gradients became ready. A full bucket is averaged over the ranks while
    backward goes on.

    The arguments up to `lazy_bucket_allocation` have torch's names, positions and defaults; docs/ddp.md describes what
    each does and where it differs from torch. `process_group` is a `Communicator` or a torch process group; by default
    `ringred.init()`'s communicator. ringred's own:

    - `reduce_op`: "avg" or "sum". Batches of different sizes are averaged exactly by `weigh`.
    - `algorithm`, `grid`: as in `Communicator.all_reduce`.
    - `deterministic`: every element is added in rank order, so that gradients are bitwise the same with any bucket
      cap, any transport, and any algorithm that adds in rank order.
    - `bucket_plan`: a plan that `bucket_plan()` returned, or a file that `save_bucket_plan` wrote. Its buckets are
      used from the start, so that the first iteration overlaps as well as later ones.
    - `check_finite`: NaN and infinity in a gradient are found before they are reduced; every rank raises
      `NonFiniteGradient`, which names the parameter and the rank that they come from.
    - `desync_check_every`: every `desync_check_every` synchronised forwards, ranks compare checksums of their
      parameters; if they differ, every rank raises `ReplicasDiverged`. 0 means never.
    - `on_failure`: "raise", or "shrink": when ranks fail, those that are left repeat what not all have done and go on
      without them, over `comm`, which is then another communicator (docs/faults.md).

    Li et al., PyTorch distributed: experiences on accelerating data parallel training (VLDB 2020).
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: Any = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        delay_all_reduce_named_params: Sequence[tuple[str, Tensor]] | None = None,
        param_to_hook_all_reduce: Tensor | None = None,
        mixed_precision: Any = None,
        device_mesh: Any = None,
        skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: Sequence[float] | None = None,
        batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None,
        lazy_bucket_allocation: bool = False,
        *,
        reduce_op: str | ReduceOp = "avg",
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        deterministic: bool = False,
        bucket_plan: BucketPlan | str | Path | None = None,
        check_finite: bool = False,
        desync_check_every: int = 0,
        on_failure: str = "raise",
    ) -> None:
        super().__init__()
        arguments.check_supported(mixed_precision, lazy_bucket_allocation)
        arguments.warn_of_ignored(check_reduction, forward_sync_buffers is not None and broadcast_buffers is not None)
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        named = [(name, p) for name, p in module.named_parameters() if name not in ignored]
        self._inputs_to = arguments.check_parameters(named, device_ids, output_device)
        # broadcast_buffers=False leaves buffers alone at the start as well, as in torch.
        init_buffers = forward_sync_buffers is not None or broadcast_buffers is not False
        self.forward_sync_buffers = init_buffers if forward_sync_buffers is None else forward_sync_buffers
        self.process_group = arguments.group_asked_for(process_group, device_mesh)
        self.comm: Communicator = default_communicator(self.process_group)
        settings = Settings(
            caps=arguments.bucket_caps(bucket_cap_mb, bucket_cap_mb_list),
            op=arguments.op_of(reduce_op),
            algorithm=arguments.algorithm_of(algorithm, grid, deterministic),
            grid=None if grid is None else tuple(grid),
            as_views=gradient_as_bucket_view,
            find_unused=find_unused_parameters,
            static_graph=static_graph,
            skip_unused=skip_all_reduce_unused_params,
            batched_copy=batched_grad_copy,
            check_finite=check_finite,
            deterministic=deterministic,
            recovers=arguments.recovers(on_failure, module, gradient_as_bucket_view),
        )
        alike = [
            *arguments.as_text(settings, desync_check_every, bucket_plan),
            f"init_sync={init_sync}, {init_buffers}, forward_sync_buffers={self.forward_sync_buffers}",
            *arguments.special_parameters(module, delay_all_reduce_named_params, param_to_hook_all_reduce),
        ]
        buffers = [buffer for name, buffer in module.named_buffers() if name not in ignored]

        def begin() -> None:
            check_same_model(self.comm, module, ignored, alike)
            members = arguments.members_of(module, named, delay_all_reduce_named_params, param_to_hook_all_reduce)
            plan = None if bucket_plan is None else arguments.read_plan(bucket_plan, members)
            if init_sync:
                state = [*(p for _, p in named), *(buffers if init_buffers else [])]
                broadcast_tensors(self.comm, state, whole=settings.recovers)
            self._begin(module, ignored, desync_check_every, Reducer(self.comm, members, settings, plan))

        if settings.recovers:
            self._begin_with_those_left(Recovery.of(self.comm), begin)
        else:
            begin()
        self.reducer.name = next_name(self.comm)

    def _begin(self, module: nn.Module, ignored: set[str], desync_check_every: int, reducer: Reducer) -> None:
        self.module, self.parameters_to_ignore, self.reducer = module, ignored, reducer
        self._desync_check_every = desync_check_every
        self.require_backward_grad_sync = True
        self._as_given = AsGiven(self.comm.rank, module, ignored, reducer.members.parameters)
        self._forwards = 0  # number of synchronised forwards so far
        self._sync_buffers_next = True
        self._weights = Weights(self.comm)
        self._uneven: UnevenInputs | None = None
        self.recovery = reducer.recovery
        if self.recovery is not None:
            reducer.weighed_again = self._weights.gathered

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedDataParallel:
        """A wrapper of a copy of the module over the same ranks, without a communication hook."""
        return _again(copy.deepcopy(self.module, memo), self._state(), self.comm)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.module, self._state())  # unpickling uses the default communicator

    def _state(self) -> dict[str, Any]:
        members = self.reducer.members
        names = {id(p): name for name, p in self.module.named_parameters(remove_duplicate=False)}
        return {
            "settings": self.reducer.settings,
            "members": {"names": members.names, "sparse": members.sparse, "delayed": members.delayed},
            "trigger": None if members.trigger is None else names[id(members.trigger)],
            "plan": self.reducer.layout.plan if self.reducer.rebuilt else None,
            "name": f"{self.reducer.name} copied",
            "ignored": self.parameters_to_ignore,
            "desync_check_every": self._desync_check_every,
            "forward_sync_buffers": self.forward_sync_buffers,
            "training": self.training,
            "inputs_to": self._inputs_to,
        }

    # ------------------------------------------------------------------ forward

    @not_compiled(callees=False)
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        tracer = self.comm.tracer
        with tracer.record("ddp", "forward") if tracer is not None else nullcontext():
            syncing, scale = self._before_forward()
            if self._inputs_to is not None:
                inputs, kwargs = moved(self._inputs_to, inputs, kwargs)
            with compiled_in_buckets(self.reducer.settings.caps[-1]):
                outputs = self.module(*inputs, **kwargs)
            self._after_forward(outputs, syncing, scale)
        return outputs

    @not_compiled(callees=True)
    def _before_forward(self) -> tuple[bool, Callable[[], float] | None]:
        """Returns whether this forward's backward will be reduced, and what returns the factor for its gradients."""
        reducer = self.reducer
        syncing = torch.is_grad_enabled() and self.require_backward_grad_sync
        copying = self.forward_sync_buffers and self._sync_buffers_next
        root, scale = 0, cast("Callable[[], float] | None", None)
        if syncing:
            if self.recovery is not None:
                self.recovery.between_steps(self)
            reducer.check_finished()
            self._as_given.check(self.module, self.reducer.settings.find_unused)
        began = time.monotonic_ns()
        if self._uneven is not None:
            turn = self._uneven.next((syncing, copying))
            root = turn.root
            if self._scales(self._uneven):
                scale = partial(float, 1 / len(turn.active))
        self._forwards += syncing
        every = self._desync_check_every if syncing and self._uneven is None else 0
        checking = every > 0 and self._forwards % every == 0
        buffers = self._current_buffers() if copying else []
        weighed = syncing and self._weights.given

        def meet() -> None:
            nonlocal scale
            if syncing:
                reducer.rebuild()
            if weighed:
                scale = self._weights.gathered()
            if checking:
                self.check_desync()
            broadcast_tensors(self.comm, buffers, root)

        if self.recovery is None:
            meet()
        elif weighed or checking or buffers or (syncing and reducer.rebuilds):
            met = self.recovery.through(meet)
            if weighed and not met:  # others are further, and weigh again in their backward
                scale = self._weights.gathered()
        reducer.clock.waited(time.monotonic_ns() - began)
        return syncing, scale

    @not_compiled(callees=True)
    def _after_forward(self, outputs: Any, syncing: bool, scale: Callable[[], float] | None) -> None:
        # As in torch: the pass after one that was not synchronised leaves the buffers alone.
        self._sync_buffers_next = syncing
        if syncing:
            self.reducer.prepare(outputs, scale)
        elif torch.is_grad_enabled():
            self.reducer.disarm()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, forward and backward accumulate local gradients; the next synchronised backward reduces
        the sum."""
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def weigh(self, samples: float) -> None:
        """Declares that this rank's gradient of the next synchronised forward is a mean over `samples` samples. The
        reduced gradient is then the mean over the samples of all ranks, however many each rank has. All ranks must
        call it.

        Raises `ValueError` where weights have no meaning: with a communication hook, reduce_op="sum", or in `join`.
        """
        if self.reducer.layout.hooked or self.reducer.settings.op is ReduceOp.SUM or self._uneven is not None:
            raise ValueError("weigh goes with reduce_op='avg', without a communication hook, outside of join()")
        if self._weights.given or not self.require_backward_grad_sync:
            raise ValueError("weigh: once before each synchronised forward, and not within no_sync()")
        self._weights.give(samples, self.module)

    def _current_buffers(self) -> list[Tensor]:
        """The buffers as they are now: a module may put new tensors in their places."""
        return [buffer for name, buffer in self.module.named_buffers() if name not in self.parameters_to_ignore]

    # ------------------------------------------------------------------ uneven inputs

    @contextmanager
    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> Iterator[None]:
        """Within this context ranks may have different numbers of inputs, as in torch. A rank that has no inputs left
        takes part in the others' reductions with zeros. At the end, the model of the highest rank among those that
        had inputs last is copied to all ranks.

        Gradients are divided by the number of all ranks, or, without `divide_by_initial_world_size`, by the number of
        ranks that still have inputs. With `throw_on_early_termination` all ranks instead raise `RuntimeError` as soon
        as one rank has no inputs left.
        """
        if not enable:
            yield
            return
        if self.recovery is not None:
            raise ValueError("join does not go with on_failure='shrink'")
        check_joinable(self.module, self.reducer.layout, throw_on_early_termination)
        self._uneven = UnevenInputs(self.comm, divide_by_initial_world_size, throw_on_early_termination)
        try:
            yield
            self._shadow(self._uneven)
        finally:
            self._uneven = None

    def _shadow(self, uneven: UnevenInputs) -> None:
        while (turn := uneven.next(None)).active:
            if turn.syncs:
                self.reducer.rebuild()
                self._forwards += 1
            if turn.copies:
                broadcast_tensors(self.comm, self._current_buffers(), turn.root)
            if turn.syncs:
                self.reducer.shadow(self._scales(uneven))
            self._sync_buffers_next = turn.syncs
        state = [p for name, p in self.module.named_parameters() if name not in self.parameters_to_ignore]
        buffers = self._current_buffers() if self.forward_sync_buffers else []
        broadcast_tensors(self.comm, [*state, *buffers], uneven.last_root)
        self.reducer.clock.restart()

    def _scales(self, uneven: UnevenInputs) -> bool:
        """Whether gradients are divided by the number of ranks that have inputs, instead of all."""
        averages = self.reducer.settings.op is ReduceOp.AVG and not self.reducer.layout.hooked
        return averages and not uneven.divides_by_all

    # ------------------------------------------------------------------ how gradients are reduced

    def register_comm_hook(self, state: Any, hook: CommHook) -> None:
        """From here on `hook(state, bucket)` reduces the buckets instead of an all-reduce. The interface is torch's.

        The hook is called on the thread that runs backward, in the same order on all ranks. It gets a `GradBucket` with
        this rank's gradients, not divided by the number of ranks, and returns a `torch.futures.Future` of the reduced
        gradients as one flat tensor. torch's own hooks work unchanged, on a torch process group; `ringred.hooks` has
        others. A model can have one hook, which must be registered before the first backward.

        Raises `TypeError` or `ValueError` if the hook is not valid for this model, and `RuntimeError` if the model
        already has a hook or a backward was already reduced.
        """
        arguments.check_hook(hook)
        if self.recovery is not None:
            raise ValueError("a communication hook does not go with on_failure='shrink': it has a state of the ranks")
        if self.reducer.layout.hooked:
            raise RuntimeError("register_comm_hook can only be called once")
        if self.reducer.layout.shares is not None:
            raise RuntimeError("register_comm_hook does not go with a ShardedOptimizer, which reduces by itself")
        arguments.check_goes_with(state, self.reducer.settings)
        if isinstance(state, Policy):
            self.reducer.set_policy(state, None if hook is comm_hook else hook)
        else:
            self.reducer.set_hook(state, hook)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `Module.zero_grad`; it forgets gradients that lie in the shares of a `ShardedOptimizer` as well."""
        super().zero_grad(set_to_none)
        for share in self.reducer.layout.shares or ():
            share.holds = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.reducer.members.parameters[0].device

    @property
    def broadcast_buffers(self) -> bool:
        """torch's older name of `forward_sync_buffers`."""
        return self.forward_sync_buffers

    @classmethod
    def _get_active_ddp_module(cls) -> Any:
        """As in torch: for torch.compile, where a program has put this class in the place of torch's."""
        return active_ddp_module()

    @staticmethod
    def _set_params_and_buffers_to_ignore_for_model(module: nn.Module, params_and_buffers_to_ignore: Any) -> None:
        """As in torch: sets the names of the parameters and buffers of `module` that are not synchronised."""
        module._ddp_params_and_buffers_to_ignore = params_and_buffers_to_ignore


def _again(module: nn.Module, state: dict[str, Any], comm: Communicator | None = None) -> DistributedDataParallel:
    """Wraps `module` as another wrapper of the same model was, whose `_state()` is given. Not collective, unless there
    are sparse gradients."""
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(model)
    model.process_group = comm
    model.comm = default_communicator(comm)
    model.forward_sync_buffers, model._inputs_to = state["forward_sync_buffers"], state["inputs_to"]
    named = dict(module.named_parameters(remove_duplicate=False))
    trigger = None if state["trigger"] is None else named[state["trigger"]]
    parameters = tuple(named[name] for name in state["members"]["names"])
    members = Members(parameters=parameters, trigger=trigger, **state["members"])
    reducer = Reducer(model.comm, members, state["settings"], state["plan"], state["name"])
    model._begin(module, state["ignored"], state["desync_check_every"], reducer)
    if model.recovery is not None:
        model.recovery.enrol(model)
    model.training = state["training"]  # of the wrapper alone: modules within it keep their own
    return model
