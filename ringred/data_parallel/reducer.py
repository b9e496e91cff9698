"""The reducer: follows by autograd hooks which backward is running, for which forward, and when it begins and ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringred.buckets import Bucket, SparseBucket
from ringred.communicator import Communicator
from ringred.data_parallel.autograd_hooks import at_the_end_of_backward, register, weakly
from ringred.data_parallel.backward import Backward, Forward
from ringred.data_parallel.clock import Clock
from ringred.data_parallel.graph import leaves_behind, tensors_in
from ringred.data_parallel.layout import Layout, Members, Settings
from ringred.data_parallel.policy import Policy
from ringred.data_parallel.recovery import Recovery
from ringred.data_parallel.reductions import CommHook, Share
from ringred.data_parallel.repeating import carried_through
from ringred.data_parallel.replicas import agreed_plan
from ringred.runtime.folds import ReduceOp

__all__ = ["Reducer"]


class Reducer:
    """Reduces the gradients of `members` over the ranks of `comm`.

    `prepare` gets it ready for the backward of one forward. A hook on each parameter runs when its gradient has been
    accumulated. A bucket is reduced once all of its gradients are there, and at the end of backward every parameter
    gets its reduced gradient. If `plan` is given, the buckets follow it and never change. `name` distinguishes this
    reducer from others on the same communicator.
    """

    def __init__(
        self,
        comm: Communicator,
        members: Members,
        settings: Settings,
        plan: Sequence[Sequence[int]] | None = None,
        name: str = "",
    ) -> None:
        self.comm, self.members, self.settings, self.name = comm, members, settings, name
        self.layout = Layout(comm, members, settings, plan)
        self.recovery = Recovery.of(comm) if settings.recovers else None
        self.weighed_again: Callable[[], Callable[[], float]] | None = None  # weighs once more, over the ranks of now
        self.rebuilt = plan is not None or (settings.find_unused and not settings.static_graph)
        self.clock = Clock(comm.runner_on(members.parameters[0].device).device.here)
        self._reduced = False  # whether a backward was reduced yet, by `shadow` or not
        self._began = 0  # number of backwards so far, those of `shadow` included
        self.steps = 0  # number of those that all ranks have finished
        delayed = set(members.delayed)
        # How often each parameter's hook fires in one backward; with a static graph the first backward counts it.
        self._firings = [0 if at in delayed else 1 for at in range(len(members.parameters))]
        self._recording = settings.static_graph
        self._used_always: Tensor | None = None
        self._unused_always: Sequence[int] = ()
        self._ready_order: list[int] = []
        self._used: set[int] = set()  # parameters with a gradient since the last reduction, under no_sync too
        self._summed: list[tuple[int, weakref.ref[Tensor], int]] = []
        self._pass: Backward | None = None
        self._open = False  # whether a backward that passed through outputs of forward is running
        self._presumed_unused: frozenset[int] = frozenset()
        hooks = [
            (parameter, weakly(self, Reducer.on_delayed if at in delayed else Reducer.on_gradient, at))
            for at, parameter in enumerate(members.parameters)
        ]
        if members.trigger is not None:
            hooks.append((members.trigger, weakly(self, Reducer.on_trigger)))
        register(self, hooks)

    # ------------------------------------------------------------------ forward

    def check_finished(self) -> None:
        """Raises `RuntimeError` if the last backward did not come to its end, naming the gradients that are missing."""
        unfinished = self._pass
        if unfinished is None or not unfinished.touched:
            return  # it finished, or no backward was run for the last outputs
        self._pass = None
        for work in unfinished.works:  # these still use the buckets
            work.wait()
        missing = [name for name, left in zip(self.members.names, unfinished.left, strict=True) if left > 0]
        if missing and self.settings.static_graph and not self._recording:
            why = f"fewer gradients than in the first backward came for {', '.join(missing)}, but static_graph=True"
        elif missing and not self.settings.find_unused:
            why = (
                f"no gradient came for {', '.join(missing)}. Parameters that take no part in the loss need "
                "find_unused_parameters=True; all outputs of forward must take part in it"
            )
        else:
            why = "backward did not come to its end, for an exception in it perhaps"
        raise RuntimeError(
            f"rank {self.comm.rank}: expected to have finished reduction in the prior iteration before starting a "
            f"new one: {why}"
        )

    def prepare(self, outputs: Any, scale: Callable[[], float] | None = None) -> None:
        """Gets ready for the backward of the forward that gave `outputs`.

        If `scale` is given, backward calls it, multiplies gradients by the result, and sums them over the ranks.
        """
        tensors = list(tensors_in(outputs))
        forward = Forward(scale=scale)
        if self.settings.static_graph:
            forward.unused = self._unused_always
        elif self.settings.find_unused and tensors:
            used = leaves_behind(tensors)
            forward.unused = [
                at for at, p in enumerate(self.members.parameters) if id(p) not in used and self._firings[at]
            ]
        self._open, self._presumed_unused = False, frozenset()
        self._pass = self.new_backward(forward)
        self.clock.forward_ended()
        on_backward = weakly(self, Reducer.on_backward, forward)
        for tensor in tensors:
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(on_backward)

    def disarm(self) -> None:
        """Called after a forward whose backward is not reduced: gradients that come now are not reduced. A backward of
        an earlier synchronised forward is recognised when it passes through the outputs of that forward."""
        if self._pass is not None and not self._pass.touched:
            self._pass = None

    def new_backward(self, forward: Forward, launched: Callable[[], None] | None = None) -> Backward:
        settings = self.settings
        return Backward(
            self.layout,
            forward,
            self._firings,
            self._used,
            asks_for_use=self._used_always is None if settings.static_graph else settings.find_unused,
            on_launched=launched or weakly(self, Reducer._finish_at_the_end),
        )

    # ------------------------------------------------------------------ backward

    def on_backward(self, forward: Forward) -> None:
        """Called when a backward reaches an output of a synchronised forward."""
        self.clock.backward_began()
        now = self._pass
        if now is not None and now.forward is not forward:
            if (now.touched or self._open) and now.forward.scale is not forward.scale:
                raise RuntimeError(
                    f"rank {self.comm.rank}: one backward goes through two forwards of different weights: weigh them "
                    "together, or make a backward of each"
                )
            if not now.touched and not self._open:
                self._pass = None  # it was prepared for another forward
        if self._open:
            return
        self._open = True
        at_the_end_of_backward(self._close)
        if self._pass is None:
            self._pass = self.new_backward(forward)

    def _close(self) -> None:
        """Runs at the end of a backward that went through outputs of forward."""
        self._open = False
        now = self._pass
        if now is None:
            return
        if not now.touched:
            if now.forward.reduced:
                self._pass = None  # torch.autograd.grad accumulates no gradients
        elif self._recording or self.settings.find_unused:
            self._complete(now)

    def _close_hidden(self) -> None:
        """Runs at the end of a backward that passed through no output that `prepare` found. Inside a reentrant
        checkpoint this may be the end of only a part of the backward."""
        now = self._pass
        if now is not None and not self._recording:
            self._presumed_unused = frozenset(at for at, left in enumerate(now.left) if left > 0)
        elif now is not None:
            self._presumed_unused = frozenset(range(len(self._firings)))
        self._close()

    def _complete(self, now: Backward) -> None:
        """Marks parameters that got no gradient as ready, because this backward is over."""
        if self._recording:
            waiting = [at for at, firings in enumerate(self._firings) if firings]
            self._firings = [before - left for before, left in zip(self._firings, now.left, strict=True)]
        else:
            waiting = [at for at, left in enumerate(now.left) if left > 0]
        for at in waiting:
            now.left[at] = 0
            now.ready(at)
        now.fill_delayed()

    def on_gradient(self, at: int) -> None:
        """The gradient of the parameter at `at` was accumulated."""
        self._used.add(at)
        if self._summed:
            self._check_summed(at)
        now = self._pass
        if now is None:
            if at in self._presumed_unused:
                raise RuntimeError(
                    f"rank {self.comm.rank}: the gradient of {self.members.names[at]!r} came when backward seemed to "
                    "be over: forward must return its tensors in lists, dicts or dataclasses, for find_unused_parame"
                    "ters or static_graph to see them beside a reentrant checkpoint (use_reentrant=False helps)"
                )
            return
        if not now.touched:
            self._first_gradient(now)
        left = now.left[at] = now.left[at] - 1
        if left > 0 or self._recording:
            return
        if left < 0:
            raise RuntimeError(
                f"rank {self.comm.rank}: parameter {self.members.names[at]!r} was marked ready twice in one iteration: "
                "it took part in a second backward, or in a reentrant checkpoint (use_reentrant=False or "
                "static_graph=True helps)"
            )
        now.ready(at)

    def _check_summed(self, at: int) -> None:
        """Raises `RuntimeError` if a parameter still holds the sum of an earlier reduction, which would be summed over
        the ranks again. `at` is the place of the first parameter whose gradient was accumulated since then."""
        summed, self._summed = self._summed, []
        for place, reference, version in summed:
            held = self.members.parameters[place].grad
            if held is None or held is not reference():
                continue
            # Was it zeroed? The gradient at `at` has just been accumulated: if that is its only change since the sum
            # was handed out, it was not zeroed before.
            still = held._version == version + 1 if place == at else bool(held.detach().any())
            if still:
                self._pass = None
                raise RuntimeError(
                    f"rank {self.comm.rank}: parameter {self.members.names[place]!r} still holds the sum of an earlier "
                    "reduction, which reduce_op='sum' would add up again over the ranks: call zero_grad() between"
                )

    def _first_gradient(self, now: Backward) -> None:
        if now.forward.reduced and self.settings.op is ReduceOp.SUM:
            self._pass = None
            raise RuntimeError(
                f"rank {self.comm.rank}: a second backward of one forward cannot be reduced with reduce_op='sum': what "
                "the first one summed would be summed again"
            )
        now.touched = True
        self._begin(now)
        if not self._open and (self._recording or self.settings.find_unused):
            at_the_end_of_backward(self._close_hidden)
        for unused in now.forward.unused:
            now.left[unused] = 0
            now.ready(unused)

    def _begin(self, now: Backward) -> None:
        self._began += 1
        now.purpose = f"backward {self._began}{self.name}"
        self.comm.note("step", self._began)

    def on_trigger(self) -> None:
        """Called when the gradient for which the delayed parameters wait has been accumulated."""
        now = self._pass
        if now is not None and not self._recording:
            if not now.touched:
                self._first_gradient(now)
            now.fill_delayed()

    def on_delayed(self, at: int) -> None:
        """The gradient of a delayed parameter was accumulated."""
        if self._pass is not None and self.layout.buckets[self.layout.place_of[at][0]].missing == 0:
            raise RuntimeError(
                f"rank {self.comm.rank}: the gradient of the delayed parameter {self.members.names[at]!r} came after "
                "that of param_to_hook_all_reduce, and would be lost"
            )

    def _finish_at_the_end(self) -> None:
        at_the_end_of_backward(self.finish)

    def finish(self) -> None:
        """Runs at the end of the backward in which the last bucket was full."""
        ended = self.clock.ended()
        now, self._pass = self._pass, None
        assert now is not None, "a backward that ends has begun"
        if self.recovery is None:
            now.wait()
        else:
            now = carried_through(self, now, self.recovery)
        self._note_reduced(now)
        now.forward.reduced = True
        if not self.rebuilt:
            self._ready_order = now.order
        if self._recording:
            self._recording = False
            delayed = self.members.delayed
            self._unused_always = [at for at, firings in enumerate(self._firings) if not firings and at not in delayed]
        self._note_times(now, ended)
        self._used.clear()
        now.raise_non_finite()
        now.hand_out(self._used_always if now.used_somewhere is None else now.used_somewhere)
        if self.settings.op is ReduceOp.SUM:
            held = [(at, parameter.grad) for at, parameter in enumerate(self.members.parameters)]
            self._summed = [(at, weakref.ref(g), g._version) for at, g in held if g is not None]

    def adopt(self, comm: Communicator) -> None:
        """From here on gradients are reduced over the ranks of `comm`, in the buckets of rank 0 there. Collective. A
        backward that is under way keeps its own."""
        plan, self.rebuilt = agreed_plan(comm, self.layout.plan, self.rebuilt)
        self.comm, self.layout = comm, Layout(comm, self.members, self.settings, plan)

    def progress(self) -> dict[str, Any]:
        """How far it has come."""
        return {"began": self._began, "steps": self.steps, "reduced": self._reduced, "used": self._used_always}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._began, self.steps, self._reduced = state["began"], state["steps"], state["reduced"]
        self._used_always = state["used"]

    def _note_reduced(self, now: Backward) -> None:
        self._reduced, self.steps = True, self.steps + 1
        if self.recovery is not None:
            self.recovery.backward_done()
        if self.settings.static_graph and self._used_always is None:
            self._used_always = now.used_somewhere

    def _note_times(self, now: Backward, ended: tuple[int, Any]) -> None:
        self.clock.note(ended, now.ready_ns, now.full_ns, now.works, now.described())
        self.clock.trace(self.comm.tracer)

    # ------------------------------------------------------------------ between two backwards

    @property
    def rebuilds(self) -> bool:
        """Whether `rebuild` has something to do. The same on all ranks."""
        return self._reduced and not self.rebuilt

    def rebuild(self) -> None:
        """Lays the buckets out anew, once, in the order in which rank 0's first gradients became ready."""
        if not self.rebuilds:
            return
        self.rebuilt = True
        laid_out = [at for indices in self.layout.plan for at in indices if at not in self.members.delayed]
        complete = len(self._ready_order) == len(laid_out)  # rank 0 may not have made a backward of its own
        order = torch.tensor(self._ready_order if complete else laid_out, dtype=torch.int64)
        self.comm.broadcast(order, 0)
        parameters = self.members.parameters
        gradients = [parameter.grad for parameter in parameters]
        self.layout.lay_out(order.tolist())
        if self.settings.as_views:
            for bucket in self.layout.buckets:
                if isinstance(bucket, SparseBucket):
                    continue
                for index, view in zip(bucket.indices, bucket.views, strict=True):
                    gradient = gradients[index]
                    if gradient is not None:
                        view.copy_(gradient)
                        parameters[index].grad = view

    def set_hook(self, state: Any, hook: CommHook) -> None:
        """From here on `hook` reduces dense buckets. Raises `RuntimeError` once a backward was reduced."""
        self._expect_fresh("a communication hook is registered")
        self.layout.set_hook(state, hook)

    def set_policy(self, policy: Policy, hook: CommHook | None = None) -> None:
        """As `set_hook`, with a policy; `hook`, if given, calls it."""
        self._expect_fresh("a communication hook is registered")
        policy.attach(self.comm, self.members.parameters)
        self.layout.set_policy(policy, hook)

    def shard(self, plan: Sequence[Sequence[int]]) -> list[Share]:
        """From here on each rank gets only its share of the reduced gradients, in fixed buckets given by `plan`. Raises
        `RuntimeError` once a backward was reduced."""
        self._expect_fresh("gradients are shared out")
        if self.recovery is not None:
            raise ValueError("a ShardedOptimizer does not go with on_failure='shrink': a rank's share goes with it")
        self.rebuilt = True
        return self.layout.shard(plan)

    def _expect_fresh(self, what: str) -> None:
        if self.clock.noted or (self._pass is not None and self._pass.touched):
            raise RuntimeError(f"rank {self.comm.rank}: {what} before the first backward, or not at all")

    def shadow(self, scaled: bool) -> None:
        """Takes part, with zeros, in the reductions of a backward that other ranks make and this one does not.
        `scaled` is whether they scale their gradients."""
        now = self.new_backward(Forward())
        self._begin(now)
        # This rank's gradients may be views of the buckets, and must not change.
        kept = [bucket.flat.clone() for bucket in self.layout.buckets if isinstance(bucket, Bucket)]
        op = ReduceOp.SUM if scaled else self.settings.op
        self._used.clear()
        now.launch_zeros(op)
        now.wait()
        for flat, before in zip((b.flat for b in self.layout.buckets if isinstance(b, Bucket)), kept, strict=True):
            flat.copy_(before)
        self._note_reduced(now)
        now.raise_non_finite()
