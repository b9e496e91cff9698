"""DistributedDataParallel: autograd hooks fill buckets, and full buckets are reduced while backward goes on."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ringred.bootstrap import default_communicator
from ringred.buckets import FIRST_BUCKET_BYTES, Bucket, Entry, assign
from ringred.communicator import Communicator, PersistentAllReduce
from ringred.errors import RingredError, UnsupportedTensor
from ringred.graph import leaves_behind, tensors_in
from ringred.ops import ReduceOp
from ringred.overlap import BucketTimes, OverlapReport
from ringred.replicas import broadcast_tensors, check_same_model
from ringred.work import Work

__all__ = ["DistributedDataParallel"]

_MIB = 1 << 20

# torch's arguments that this version does not carry out: the value that asks for nothing, and why not.
_REFUSED: dict[str, tuple[Any, str]] = {
    "device_ids": (None, "modules on CPUs have no device ids"),
    "output_device": (None, "modules on CPUs have no output device"),
    "static_graph": (False, "graphs are not recorded; find_unused_parameters=True covers unused ones"),
    "delay_all_reduce_named_params": (None, "delayed reduction is not supported"),
    "param_to_hook_all_reduce": (None, "delayed reduction is not supported"),
    "mixed_precision": (None, "use torch.autocast around the forward pass"),
    "device_mesh": (None, "pass the mesh's process group as process_group"),
    "skip_all_reduce_unused_params": (False, "unused parameters are reduced as zeros"),
}


class DistributedDataParallel(nn.Module):
    """Trains `module` on every rank with the mean of the gradients of all: torch's DDP over ringred.

    Parameters and buffers of rank 0 are copied to all ranks at the start (`init_sync`), after a check that all
    ranks built the same model (`ModelMismatch` names what differs, on every rank). In backward a gradient is
    ready when it is accumulated; gradients fill buckets of `bucket_cap_mb` MiB (25, the first 1, where it is
    None), in reverse order of the parameters, and, from the second iteration, in the order in which rank 0's
    gradients were ready. A full bucket is averaged over the ranks while backward goes on.

    `process_group` is a `Communicator` or a torch process group; by default `ringred.init()`'s communicator.
    `algorithm` and `grid` are as in `Communicator.all_reduce`. `find_unused_parameters` as in torch: without
    it, a parameter without gradient is an error at the next forward, which names it. With
    `gradient_as_bucket_view` each `.grad` is its place in the bucket, and nothing is copied back.

    Li et al., PyTorch distributed: experiences on accelerating data parallel training (VLDB 2020).
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        dim: int = 0,
        broadcast_buffers: bool = True,
        init_sync: bool = True,
        process_group: Any = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        asked = {**others, "device_ids": device_ids, "output_device": output_device, "static_graph": static_graph}
        for name, value in asked.items():
            if name not in _REFUSED:
                raise TypeError(f"DistributedDataParallel got an unexpected argument {name!r}")
            neutral, reason = _REFUSED[name]
            if value != neutral:
                raise ValueError(f"DistributedDataParallel: {name}={value!r} is not supported: {reason}")
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        named = [(name, p) for name, p in module.named_parameters() if name not in ignored]
        self._names = [name for name, parameter in named if parameter.requires_grad]
        self._parameters_in_order = [parameter for _, parameter in named if parameter.requires_grad]
        if bucket_cap_mb is not None and bucket_cap_mb <= 0:
            raise ValueError(f"DistributedDataParallel: expected bucket_cap_mb > 0, got {bucket_cap_mb}")
        self.module = module
        self.dim, self.check_reduction = dim, check_reduction
        self.broadcast_buffers = broadcast_buffers
        self.find_unused_parameters = find_unused_parameters
        self.gradient_as_bucket_view = gradient_as_bucket_view
        self.require_backward_grad_sync = True
        self.algorithm, self.grid = algorithm, grid
        self.comm: Communicator = default_communicator(process_group)
        self._ignored = ignored
        check_same_model(self.comm, module, ignored)
        if not self._parameters_in_order:
            raise RuntimeError(
                "DistributedDataParallel is not needed when a module has no parameter that requires a gradient"
            )
        if init_sync:
            broadcast_tensors(self.comm, [*(p for _, p in named), *self._current_buffers()])
        cap = 25 if bucket_cap_mb is None else bucket_cap_mb
        self._cap_bytes = int(cap * _MIB)
        self._first_cap_bytes = FIRST_BUCKET_BYTES if bucket_cap_mb is None else self._cap_bytes
        self._index = {id(parameter): at for at, parameter in enumerate(self._parameters_in_order)}
        self._build_buckets(list(reversed(range(len(self._parameters_in_order)))))
        self._ready_order: list[int] = []
        self._rebuilt = find_unused_parameters
        self._expecting = False  # a synchronised forward was made and its reduction is not finished
        self._sync_buffers_next = True
        self._unused: list[int] = []
        self._used_here: set[int] = set()  # since the last reduction, in unsynchronised passes too
        self._used_somewhere: tuple[Tensor, Work[None]] | None = None
        self._began_ns = self._forward_ended_ns = 0
        self._report: OverlapReport | None = None
        # The hooks live as long as the parameters; a wrapper that is dropped must not go on reducing.
        on_gradient = weakref.WeakMethod(self._on_gradient)
        handles = [p.register_post_accumulate_grad_hook(_calling(on_gradient)) for p in self._parameters_in_order]
        weakref.finalize(self, _remove, handles)

    # ------------------------------------------------------------------ forward

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        tracer = self.comm.tracer
        with tracer.record("ddp", "forward") if tracer is not None else nullcontext():
            syncing = torch.is_grad_enabled() and self.require_backward_grad_sync
            if syncing:
                self._check_finished()
                self._check_parameters()
                self._rebuild_buckets()
            if self.broadcast_buffers and self._sync_buffers_next:
                broadcast_tensors(self.comm, self._current_buffers())
            outputs = self.module(*inputs, **kwargs)
            # As in torch: the pass after one that was not synchronised leaves the buffers alone.
            self._sync_buffers_next = syncing
            if syncing:
                self._prepare(outputs)
        return outputs

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

    def _current_buffers(self) -> list[Tensor]:
        """The buffers as they are now: a module may put new tensors in their places."""
        return [buffer for name, buffer in self.module.named_buffers() if name not in self._ignored]

    def _check_finished(self) -> None:
        if not self._expecting or not self._seen:
            return  # finished, or no backward was made at all: the last outputs were only looked at
        self._expecting = False
        for work in self._works:  # of a backward that was given up: they still use the buckets
            if work is not None:
                work.wait()
        missing = [name for at, name in enumerate(self._names) if at not in self._seen]
        if missing and not self.find_unused_parameters:
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

    def _check_parameters(self) -> None:
        """A parameter that was replaced, frozen or unfrozen since the construction would go unsynchronised."""
        frozen = [n for n, p in self.module.named_parameters() if id(p) in self._index and not p.requires_grad]
        if frozen and len(frozen) < len(self._names) and not self.find_unused_parameters:
            raise RuntimeError(
                f"rank {self.comm.rank}: parameter {frozen[0]!r} was frozen after DistributedDataParallel was "
                "constructed, and its bucket would wait for it: construct it anew, or use find_unused_parameters=True"
            )
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in self._index and name not in self._ignored:
                raise RuntimeError(
                    f"rank {self.comm.rank}: parameter {name!r} was added, replaced or unfrozen after "
                    "DistributedDataParallel was constructed; its gradient would not be reduced. Construct it anew"
                )

    def _prepare(self, outputs: Any) -> None:
        """Gets ready for the backward of this forward."""
        self._expecting = True
        self._seen: set[int] = set()
        self._launched = 0
        if not self._rebuilt:
            self._ready_order = []
        self._times: list[int] = [0] * len(self._buckets)
        self._works: list[Work[None] | None] = [None] * len(self._buckets)
        for bucket in self._buckets:
            bucket.missing = len(bucket.indices)
        self._unused, self._used_somewhere = [], None
        tensors = list(tensors_in(outputs))
        if self.find_unused_parameters and tensors:
            used = leaves_behind(tensors)
            self._unused = [at for at, p in enumerate(self._parameters_in_order) if id(p) not in used]
        self._forward_ended_ns = time.monotonic_ns()
        self._began_ns = 0
        for tensor in tensors:
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(self._on_backward)

    # ------------------------------------------------------------------ backward

    def _on_backward(self, gradient: Tensor) -> None:
        if not self._began_ns:
            self._began_ns = time.monotonic_ns()

    def _on_gradient(self, parameter: Tensor) -> None:
        """Runs in backward, after the gradient of `parameter` is accumulated."""
        at = self._index[id(parameter)]
        self._used_here.add(at)
        if not self._expecting:
            return
        if not self._seen and self.find_unused_parameters:
            _at_the_end_of_backward(self._mark_the_rest)
            for unused in self._unused:
                self._mark_ready(unused)
        self._mark_ready(at)

    def _mark_the_rest(self) -> None:
        """Parameters behind outputs that the loss does not use: the graph alone did not tell."""
        for at in range(len(self._parameters_in_order)):
            if at not in self._seen:
                self._mark_ready(at)

    def _mark_ready(self, at: int) -> None:
        if at in self._seen:
            raise RuntimeError(
                f"rank {self.comm.rank}: parameter {self._names[at]!r} was marked ready twice in one iteration: it "
                "took part in a second backward, or in a reentrant checkpoint (use_reentrant=False helps)"
            )
        self._seen.add(at)
        if not self._rebuilt:
            self._ready_order.append(at)
        number, place = self._place_of[at]
        bucket = self._buckets[number]
        self._put(at, bucket, place)
        bucket.missing -= 1
        if bucket.missing == 0:
            self._times[number] = time.monotonic_ns()
            self._launch_ready()

    def _put(self, at: int, bucket: Bucket, place: int) -> None:
        """Copies a gradient into its bucket at once: it is still in the cache, and as a view of the bucket its own
        memory is free for the next one."""
        parameter = self._parameters_in_order[at]
        # An unused parameter may hold what earlier passes accumulated; else it counts as zeros.
        gradient = parameter.grad
        if gradient is not None:
            where = f"rank {self.comm.rank}: parameter {self._names[at]!r}"
            if gradient.layout != torch.strided:
                raise UnsupportedTensor(
                    f"{where}: expected a dense gradient, got layout {gradient.layout}; use sparse=False"
                )
            if gradient.dtype != bucket.flat.dtype:
                raise UnsupportedTensor(
                    f"{where}: expected a gradient of {bucket.flat.dtype}, got {gradient.dtype}: it changed after "
                    "DistributedDataParallel was constructed. Construct it anew"
                )
        bucket.put(place, gradient)
        if gradient is not None and self.gradient_as_bucket_view:
            parameter.grad = bucket.views[place]

    def _launch_ready(self) -> None:
        """Starts the reduction of full buckets, in the order in which all ranks do."""
        while self._launched < len(self._buckets) and self._buckets[self._launched].missing == 0:
            self._works[self._launched] = self._reductions[self._launched].start()
            self._launched += 1
            if self._launched == len(self._buckets):
                if self.find_unused_parameters:
                    used = torch.zeros(len(self._parameters_in_order), dtype=torch.uint8)
                    used[list(self._used_here)] = 1
                    self._used_somewhere = used, self.comm.all_reduce(used, ReduceOp.MAX, async_op=True)
                _at_the_end_of_backward(self._finish)

    def _finish(self) -> None:
        """Runs at the end of the backward in which the last bucket was full."""
        ended_ns = time.monotonic_ns()
        self._expecting = False
        for work in self._works:
            assert work is not None, "every bucket was launched"
            work.wait()
        self._hand_out()
        self._used_here.clear()
        self._note_times(ended_ns)

    def _hand_out(self) -> None:
        """Gives every parameter its reduced gradient; one that no rank used keeps what it has."""
        used: Tensor | None = None
        if self._used_somewhere is not None:
            used, work = self._used_somewhere
            work.wait()
        targets, sources = [], []
        for bucket in self._buckets:
            for index, view in zip(bucket.indices, bucket.views, strict=True):
                if used is not None and not used[index]:
                    continue
                parameter = self._parameters_in_order[index]
                if parameter.grad is None:
                    parameter.grad = view if self.gradient_as_bucket_view else view.clone()
                elif not self.gradient_as_bucket_view:
                    targets.append(parameter.grad.detach())
                    sources.append(view)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _note_times(self, ended_ns: int) -> None:
        began = self._began_ns or self._forward_ended_ns

        def since(at_ns: int) -> float:
            return (at_ns - began) / 1e6

        rows = []
        for number, (bucket, work) in enumerate(zip(self._buckets, self._works, strict=True)):
            assert work is not None, "every bucket was launched"
            exposed = max(0, work.ended_ns - max(ended_ns, work.started_ns)) / 1e6
            ready = self._times[number]
            times = (since(ready), since(work.started_ns), since(work.ended_ns))
            rows.append(BucketTimes(number, bucket.nbytes, len(bucket.indices), *times, exposed))
            if self.comm.tracer is not None:
                tracer = self.comm.tracer
                tracer.instant("ddp", f"bucket {number} ready", ready, "buckets", bytes=bucket.nbytes)
                name = f"bucket {number} ({self._reductions[number].algorithm})"
                tracer.span("ddp", name, work.started_ns, work.ended_ns, "buckets", bytes=bucket.nbytes)
        if self.comm.tracer is not None:
            self.comm.tracer.span("ddp", "backward", began, ended_ns)
        self._report = OverlapReport(since(ended_ns), tuple(rows))

    def overlap_report(self) -> OverlapReport:
        """Per bucket of the last synchronised backward: ready, start, end, and what backward did not hide."""
        if self._report is None:
            raise RingredError("overlap_report: no synchronised backward has ended yet")
        return self._report

    # ------------------------------------------------------------------ buckets

    def _build_buckets(self, order: Sequence[int]) -> None:
        parameters = self._parameters_in_order
        entries = [Entry(p.numel() * p.element_size(), (p.dtype, p.device)) for p in parameters]
        assigned = assign(entries, order, self._cap_bytes, self._first_cap_bytes)
        self._buckets = [Bucket(indices, parameters, self.comm.empty) for indices in assigned]
        self._place_of = {
            index: (number, place) for number, indices in enumerate(assigned) for place, index in enumerate(indices)
        }
        self._reductions: list[PersistentAllReduce] = [
            self.comm.all_reduce_init(bucket.flat, ReduceOp.AVG, algorithm=self.algorithm, grid=self.grid)
            for bucket in self._buckets
        ]

    def _rebuild_buckets(self) -> None:
        """Once, after the first synchronised backward: buckets in the order in which rank 0's were ready."""
        if self._rebuilt or len(self._ready_order) < len(self._parameters_in_order):
            return
        self._rebuilt = True
        order = torch.tensor(self._ready_order, dtype=torch.int64)
        self.comm.broadcast(order, 0)
        gradients = [parameter.grad for parameter in self._parameters_in_order]
        self._build_buckets(order.tolist())
        if self.gradient_as_bucket_view:
            for bucket in self._buckets:
                for index, view in zip(bucket.indices, bucket.views, strict=True):
                    gradient = gradients[index]
                    if gradient is not None:
                        view.copy_(gradient)
                        self._parameters_in_order[index].grad = view


def _at_the_end_of_backward(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _calling(method: weakref.WeakMethod[Any]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        alive = method()
        if alive is not None:
            alive(parameter)

    return hook


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
