"""The reducer: gradients on their way into buckets, over the ranks and back, while backward goes on."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringred.buckets import Bucket, SparseBucket
from ringred.communicator import Communicator
from ringred.errors import NonFiniteGradient, UnsupportedTensor
from ringred.graph import leaves_behind, tensors_in
from ringred.layout import Layout, Members, Settings
from ringred.ops import ReduceOp
from ringred.overlap import BackwardTimes, trace
from ringred.policy import Policy
from ringred.reductions import CommHook, InFlight, Nothing, Share
from ringred.work import Work

__all__ = ["Reducer"]

_ARRIVALS = 1000  # backward passes whose arrival times are kept
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(slots=True)
class _Forward:
    """One forward whose backward is reduced: `unused` are the places of parameters that are not behind its outputs,
    `scale()` is what its gradients are multiplied by, and `reduced` whether a backward of it was."""

    unused: Sequence[int] = ()
    scale: Callable[[], float] | None = None
    reduced: bool = False


@dataclass(slots=True)
class _Pass:
    """One backward under way: `left` counts the gradients that each parameter still waits for."""

    forward: _Forward
    left: list[int]
    ready_ns: list[int]
    full_ns: list[int]
    works: list[InFlight] = field(default_factory=list)
    behind: list[Work[None]] = field(default_factory=list)
    touched: bool = False  # a gradient has come
    purpose: str = ""
    used: Tensor | None = None
    found: Tensor | None = None
    non_finite: tuple[int, int, int] = (-1, 0, 0)


class Reducer:
    """Reduces the gradients of `members` over the ranks of `comm`.

    `prepare` arms it for the backward of one forward. A hook on each parameter says when its gradient is there; a
    bucket whose gradients are all there is reduced, and at the end of backward every parameter gets its result.
    `plan` gives the buckets to begin with, and to stay with. `name` tells it from others on the communicator.
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
        self.rebuilt = plan is not None or (settings.find_unused and not settings.static_graph)
        self.arrivals: deque[float] = deque(maxlen=_ARRIVALS)
        """Seconds of its own that this rank took from the end of one backward's reductions until the next one's last
        bucket was full."""
        self.last: BackwardTimes | None = None
        self._reduced = 0  # backwards, with or without gradients of this rank
        self._began = 0  # backwards in which a gradient of this rank came
        delayed = set(members.delayed)
        # How often the hook of each parameter fires in one backward; with a static graph the first one tells.
        self._firings = [0 if at in delayed else 1 for at in range(len(members.parameters))]
        self._recording = settings.static_graph
        self._used_always: Tensor | None = None
        self._unused_always: Sequence[int] = ()
        self._ready_order: list[int] = []
        self._used: set[int] = set()  # since the last reduction, in unsynchronised passes too
        self._summed: list[tuple[int, weakref.ref[Tensor], int]] = []
        self._pass: _Pass | None = None
        self._open = False  # within a backward that went through outputs of forward
        self._presumed_unused: frozenset[int] = frozenset()
        self._began_ns = self._forward_ended_ns = self._waited_ns = self._free_ns = 0
        # The hooks live as long as the parameters; a reducer that is dropped must not go on reducing.
        me = weakref.ref(self)
        hooked: list[tuple[Any, Callable[..., None]]] = [
            (parameter, partial(_on_delayed if at in delayed else _on_gradient, me, at))
            for at, parameter in enumerate(members.parameters)
        ]
        if members.trigger is not None:
            hooked.append((members.trigger, partial(_on_trigger, me)))
        handles = [parameter.register_post_accumulate_grad_hook(hook) for parameter, hook in hooked]
        weakref.finalize(self, _remove, handles)

    # ------------------------------------------------------------------ forward

    def check_finished(self) -> None:
        """Raises `RuntimeError` if the last backward did not come to its end, naming the gradients that are missing."""
        unfinished = self._pass
        if unfinished is None or not unfinished.touched:
            return  # finished, or no backward was made at all: the last outputs were only looked at
        self._pass = None
        for work in unfinished.works:  # of a backward that was given up: they still use the buckets
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

        With `scale`, which is called in backward, gradients are multiplied by what it returns, and then summed.
        """
        tensors = list(tensors_in(outputs))
        forward = _Forward(scale=scale)
        if self.settings.static_graph:
            forward.unused = self._unused_always
        elif self.settings.find_unused and tensors:
            used = leaves_behind(tensors)
            forward.unused = [
                at for at, p in enumerate(self.members.parameters) if id(p) not in used and self._firings[at]
            ]
        self._open, self._presumed_unused = False, frozenset()
        self._pass = self._new_pass(forward)
        self._began_ns, self._forward_ended_ns = 0, time.monotonic_ns()
        on_backward = partial(_on_backward, weakref.ref(self), forward)
        for tensor in tensors:
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(on_backward)

    def disarm(self) -> None:
        """For a forward whose backward is not reduced: that of the last one is over, or will come through its
        outputs."""
        if self._pass is not None and not self._pass.touched:
            self._pass = None

    def _new_pass(self, forward: _Forward) -> _Pass:
        layout = self.layout
        for bucket in layout.buckets:
            bucket.missing = len(bucket.indices)
        for number in layout.delayed:
            layout.buckets[number].missing = 1
        if not self.rebuilt:
            self._ready_order = []
        return _Pass(forward, list(self._firings), [0] * len(self._firings), [0] * len(layout.buckets))

    # ------------------------------------------------------------------ backward

    def on_backward(self, forward: _Forward) -> None:
        """A backward has come to outputs of a synchronised forward."""
        if not self._began_ns:
            self._began_ns = time.monotonic_ns()
        now = self._pass
        if now is not None and now.forward is not forward:
            if (now.touched or self._open) and now.forward.scale is not forward.scale:
                raise RuntimeError(
                    f"rank {self.comm.rank}: one backward goes through two forwards of different weights: weigh them "
                    "together, or make a backward of each"
                )
            if not now.touched and not self._open:
                self._pass = None  # the one that was armed is an older or a younger one
        if self._open:
            return
        self._open = True
        _at_the_end_of_backward(self._close)
        if self._pass is None:
            self._pass = self._new_pass(forward)

    def _close(self) -> None:
        """Runs at the end of a backward that went through outputs of forward."""
        self._open = False
        now = self._pass
        if now is None:
            return
        if not now.touched:
            if now.forward.reduced:
                self._pass = None  # it accumulated nothing: torch.autograd.grad
        elif self._recording or self.settings.find_unused:
            self._complete(now)

    def _close_hidden(self) -> None:
        """Runs at the end of a backward that went through no outputs that can be seen: or of a part of it, if that is
        the backward of a reentrant checkpoint."""
        now = self._pass
        if now is not None and not self._recording:
            self._presumed_unused = frozenset(at for at, left in enumerate(now.left) if left > 0)
        elif now is not None:
            self._presumed_unused = frozenset(range(len(self._firings)))
        self._close()

    def _complete(self, now: _Pass) -> None:
        """Makes ready what no gradient came for: this backward is over."""
        if self._recording:
            waiting = [at for at, firings in enumerate(self._firings) if firings]
            self._firings = [before - left for before, left in zip(self._firings, now.left, strict=True)]
        else:
            waiting = [at for at, left in enumerate(now.left) if left > 0]
        for at in waiting:
            now.left[at] = 0
            self._ready(now, at)
        self._fill_delayed(now)

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
        self._ready(now, at)

    def _check_summed(self, at: int) -> None:
        """Raises `RuntimeError` where sums of an earlier reduction would be summed once more: `at` is the place of the
        first gradient that was accumulated since."""
        summed, self._summed = self._summed, []
        for place, reference, version in summed:
            held = self.members.parameters[place].grad
            if held is None or held is not reference():
                continue
            # Zeroed or not? That of `at` has a new gradient in it: one change since the sum was handed out is that.
            still = held._version == version + 1 if place == at else bool(held.detach().any())
            if still:
                self._pass = None
                raise RuntimeError(
                    f"rank {self.comm.rank}: parameter {self.members.names[place]!r} still holds the sum of an earlier "
                    "reduction, which reduce_op='sum' would add up again over the ranks: call zero_grad() between"
                )

    def _first_gradient(self, now: _Pass) -> None:
        if now.forward.reduced and self.settings.op is ReduceOp.SUM:
            self._pass = None
            raise RuntimeError(
                f"rank {self.comm.rank}: a second backward of one forward cannot be reduced with reduce_op='sum': what "
                "the first one summed would be summed again"
            )
        now.touched = True
        self._began += 1
        now.purpose = f"backward {self._began}{self.name}"
        if not self._open and (self._recording or self.settings.find_unused):
            _at_the_end_of_backward(self._close_hidden)
        for unused in now.forward.unused:
            now.left[unused] = 0
            self._ready(now, unused)

    def on_trigger(self) -> None:
        """The gradient was accumulated that the delayed parameters wait for."""
        now = self._pass
        if now is not None and not self._recording:
            if not now.touched:
                self._first_gradient(now)
            self._fill_delayed(now)

    def on_delayed(self, at: int) -> None:
        """The gradient of a delayed parameter was accumulated."""
        if self._pass is not None and self.layout.buckets[self.layout.place_of[at][0]].missing == 0:
            raise RuntimeError(
                f"rank {self.comm.rank}: the gradient of the delayed parameter {self.members.names[at]!r} came after "
                "that of param_to_hook_all_reduce, and would be lost"
            )

    def _fill_delayed(self, now: _Pass) -> None:
        for number in self.layout.delayed:
            bucket = self.layout.buckets[number]
            if bucket.missing:
                self._used.update(at for at in bucket.indices if self.members.parameters[at].grad is not None)
                self._put_all(now, bucket)
                bucket.missing = 0
                now.full_ns[number] = time.monotonic_ns()
        self._launch_full(now)

    def _ready(self, now: _Pass, at: int) -> None:
        if not self.rebuilt:
            self._ready_order.append(at)
        number, place = self.layout.place_of[at]
        bucket = self.layout.buckets[number]
        batched = self.settings.batched_copy
        if not batched:
            self._put(now, at, bucket, place)
        now.ready_ns[at] = time.monotonic_ns()
        bucket.missing -= 1
        if bucket.missing == 0:
            if batched:
                self._put_all(now, bucket)
            now.full_ns[number] = now.ready_ns[at]
            self._launch_full(now)

    def _put(self, now: _Pass, at: int, bucket: Bucket | SparseBucket, place: int) -> None:
        """Copies a gradient into its bucket at once: it is still in the cache, and as a view of the bucket its own
        memory is free for the next one."""
        parameter = self.members.parameters[at]
        # An unused parameter may hold what earlier passes accumulated; else it counts as zeros.
        gradient = parameter.grad
        if gradient is not None:
            self._check_gradient(at, gradient, bucket)
        scale = None if now.forward.scale is None else now.forward.scale()
        # What counts for nothing is not looked at: it may be no number.
        bucket.put(place, None if scale == 0.0 else gradient, scale)
        if gradient is not None and self.settings.as_views and isinstance(bucket, Bucket):
            parameter.grad = bucket.views[place]

    def _put_all(self, now: _Pass, bucket: Bucket | SparseBucket) -> None:
        given = [self.members.parameters[at].grad for at in bucket.indices]
        gradients = [gradient.detach() for gradient in given if gradient is not None]
        plain = isinstance(bucket, Bucket) and now.forward.scale is None and not self.settings.as_views
        if not plain or len(gradients) < len(given):
            for place, at in enumerate(bucket.indices):
                self._put(now, at, bucket, place)
            return
        for at, gradient in zip(bucket.indices, gradients, strict=True):
            self._check_gradient(at, gradient, bucket)
        torch._foreach_copy_(bucket.views, gradients)

    def _check_gradient(self, at: int, gradient: Any, bucket: Bucket | SparseBucket) -> None:
        sparse, dtype = isinstance(bucket, SparseBucket), bucket.dtype
        alike = gradient.layout == torch.strided if not sparse else gradient.is_sparse and gradient.sparse_dim() == 1
        if alike and gradient.dtype == dtype:
            return
        where = f"rank {self.comm.rank}: parameter {self.members.names[at]!r}"
        if gradient.dtype != dtype:
            raise UnsupportedTensor(
                f"{where}: expected a gradient of {dtype}, got {gradient.dtype}: the module was converted after "
                "DistributedDataParallel was constructed. Construct it anew"
            )
        raise UnsupportedTensor(
            f"{where}: expected a {'gradient of sparse rows' if sparse else 'dense gradient'}, got {gradient.layout}; "
            "sparse ones are expected of torch.nn.Embedding and EmbeddingBag that had sparse=True at construction"
        )

    def _launch_full(self, now: _Pass) -> None:
        """Starts the reduction of full buckets, in the order in which all ranks do."""
        buckets = self.layout.buckets
        while len(now.works) < len(buckets) and buckets[len(now.works)].missing == 0:
            bucket = buckets[len(now.works)]
            if self.settings.check_finite:
                self._note_non_finite(now, bucket)
            if self.settings.skip_unused and self._used.isdisjoint(bucket.indices):
                now.works.append(Nothing())
            else:
                op = self.settings.op if now.forward.scale is None else ReduceOp.SUM
                purpose = f"bucket {len(now.works)} of {now.purpose}"
                now.works.append(self.layout.reduction(len(now.works), op).start(purpose))
            if len(now.works) == len(buckets):
                self._launch_behind(now)
                _at_the_end_of_backward(self._finish)

    def _launch_behind(self, now: _Pass) -> None:
        """What goes with a whole backward, behind its last bucket: who used what, and what was not finite."""
        if self._asks_for_use():
            now.used = torch.zeros(len(self._firings), dtype=torch.uint8)
            now.used[list(self._used)] = 1
            now.behind.append(self.comm.all_reduce(now.used, ReduceOp.MAX, async_op=True))
        if self.settings.check_finite:
            now.found = torch.empty(3 * self.comm.size, dtype=torch.int64)
            mine = torch.tensor(now.non_finite)
            now.behind.append(self.comm.all_gather(now.found, mine, async_op=True))  # type: ignore[arg-type]

    def _asks_for_use(self) -> bool:
        if self.settings.static_graph:
            return self._used_always is None
        return self.settings.find_unused

    def _note_non_finite(self, now: _Pass, bucket: Bucket | SparseBucket) -> None:
        """Where a gradient holds NaN or infinity, the bucket counts as zeros, so that nobody else gets them."""
        values = bucket.values
        # A sum is finite only if all of it is; where it is not for its mere size, the second look tells.
        if math.isfinite(abs(values.sum(dtype=_WIDE.get(values.dtype)).item())) or torch.isfinite(values).all():
            return
        for at, view in zip(bucket.indices, bucket.views, strict=True):
            nans, others = int(torch.isnan(view).sum()), int(torch.isinf(view).sum())
            if (nans or others) and now.non_finite[0] < 0:
                now.non_finite = at, nans, others
        values.zero_()

    def _finish(self) -> None:
        """Runs at the end of the backward in which the last bucket was full."""
        ended_ns = time.monotonic_ns()
        now, self._pass = self._pass, None
        assert now is not None, "a backward that ends has begun"
        for work in (*now.works, *now.behind):
            work.wait()
        self._reduced += 1
        now.forward.reduced = True
        if self._recording:
            self._recording = False
            delayed = self.members.delayed
            self._unused_always = [at for at, firings in enumerate(self._firings) if not firings and at not in delayed]
        self._note_times(now, ended_ns)
        self._used.clear()
        self._raise_non_finite(now)
        self._hand_out(now)

    def _note_times(self, now: _Pass, ended_ns: int) -> None:
        if self._free_ns:
            self.arrivals.append((max(now.full_ns) - self._free_ns - self._waited_ns) / 1e9)
        self._free_ns, self._waited_ns = max(work.ended_ns for work in now.works), 0
        buckets = self.layout.buckets
        # Numbers only: the buckets and the works themselves would keep memory that others have taken the place of.
        self.last = BackwardTimes(
            began_ns=self._began_ns or self._forward_ended_ns,
            ended_ns=ended_ns,
            ready_ns=now.ready_ns,
            full_ns=now.full_ns,
            started_ns=[work.started_ns for work in now.works],
            done_ns=[work.ended_ns for work in now.works],
            nbytes=[bucket.nbytes for bucket in buckets],
            parameters=[len(bucket.indices) for bucket in buckets],
            algorithms=[
                "skipped" if isinstance(work, Nothing) else self.layout.reduction(at, self.settings.op).algorithm
                for at, work in enumerate(now.works)
            ],
        )
        if self.comm.tracer is not None:
            trace(self.last, self.comm.tracer)

    def _raise_non_finite(self, now: _Pass) -> None:
        if now.found is None:
            return
        rows = now.found.view(self.comm.size, 3).tolist()
        texts = [
            f"that of {self.members.names[at]!r} on rank {rank} ({nans} NaN, {infinite} infinite)"
            for rank, (at, nans, infinite) in enumerate(rows)
            if at >= 0
        ]
        if texts:
            # No step may follow by what is reduced in part, or on this rank alone.
            for parameter in self.members.parameters:
                parameter.grad = None
            for share in self.layout.shares or ():
                share.holds = False
            raise NonFiniteGradient(
                f"rank {self.comm.rank}: expected finite gradients, but not finite is {'; '.join(texts)}. It went to "
                "no other rank; all gradients of this backward are dropped"
            )

    def _hand_out(self, now: _Pass) -> None:
        """Gives every parameter its reduced gradient; one that no rank used keeps what it has."""
        if self.settings.static_graph and self._used_always is None:
            self._used_always = now.used
        if self.layout.shares is not None:
            for parameter in self.members.parameters:
                parameter.grad = None  # reduced, it lies in the ranks' shares
            return
        used = self._used_always if now.used is None else now.used
        parameters, as_views = self.members.parameters, self.settings.as_views
        targets, sources = [], []
        for bucket, work in zip(self.layout.buckets, now.works, strict=True):
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
        if self.settings.op is ReduceOp.SUM:
            held = [(at, parameter.grad) for at, parameter in enumerate(parameters)]
            self._summed = [(at, weakref.ref(g), g._version) for at, g in held if g is not None]

    # ------------------------------------------------------------------ between two backwards

    def restart_clock(self) -> None:
        """What was noted of arrivals is forgotten: ranks did not do the same."""
        self.arrivals.clear()
        self._free_ns = self._waited_ns = 0

    def note_wait(self, nanoseconds: int) -> None:
        """Time that forward spent in collectives: it is no time of this rank's own."""
        self._waited_ns += nanoseconds

    def rebuild(self) -> None:
        """Once, after the first synchronised backward: buckets in the order in which rank 0's were ready."""
        if self.rebuilt or not self._reduced:
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

    def set_policy(self, policy: Policy) -> None:
        """As `set_hook`, by a policy."""
        self._expect_fresh("a communication hook is registered")
        policy.attach(self.comm, self.members.parameters)
        self.layout.set_policy(policy)

    def shard(self, plan: Sequence[Sequence[int]]) -> list[Share]:
        """From here on each rank gets its share of the gradients alone, in buckets that stay as `plan` says. Raises
        `RuntimeError` once a backward was reduced."""
        self._expect_fresh("gradients are shared out")
        self.rebuilt = True
        return self.layout.shard(plan)

    def _expect_fresh(self, what: str) -> None:
        if self.last is not None or (self._pass is not None and self._pass.touched):
            raise RuntimeError(f"rank {self.comm.rank}: {what} before the first backward, or not at all")

    def shadow(self, scaled: bool) -> None:
        """Takes part, with zeros, in the reductions of a backward that other ranks make and this one does not.
        `scaled` is whether they scale their gradients."""
        now = self._new_pass(_Forward())
        self._began += 1
        now.purpose = f"backward {self._began}{self.name}"
        # Gradients of this rank may lie in the buckets; nothing has happened to them.
        kept = [bucket.flat.clone() for bucket in self.layout.buckets if isinstance(bucket, Bucket)]
        op = ReduceOp.SUM if scaled else self.settings.op
        self._used.clear()
        for number, bucket in enumerate(self.layout.buckets):
            for place in range(len(bucket.indices)):
                bucket.put(place, None)
            now.works.append(self.layout.reduction(number, op).start(f"bucket {number} of {now.purpose}"))
        self._launch_behind(now)
        for work in (*now.works, *now.behind):
            work.wait()
        for flat, before in zip((b.flat for b in self.layout.buckets if isinstance(b, Bucket)), kept, strict=True):
            flat.copy_(before)
        self._reduced += 1
        if self.settings.static_graph and self._used_always is None:
            self._used_always = now.used
        self._raise_non_finite(now)


def _at_the_end_of_backward(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _on_gradient(reducer: weakref.ref[Reducer], at: int, parameter: Tensor) -> None:
    alive = reducer()
    if alive is not None:
        alive.on_gradient(at)


def _on_trigger(reducer: weakref.ref[Reducer], parameter: Tensor) -> None:
    alive = reducer()
    if alive is not None:
        alive.on_trigger()


def _on_delayed(reducer: weakref.ref[Reducer], at: int, parameter: Tensor) -> None:
    alive = reducer()
    if alive is not None:
        alive.on_delayed(at)


def _on_backward(reducer: weakref.ref[Reducer], forward: _Forward, gradient: Tensor) -> None:
    alive = reducer()
    if alive is not None:
        alive.on_backward(forward)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
