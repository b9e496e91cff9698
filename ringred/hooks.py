"""Communication hooks: other ways to reduce the buckets of ringred's or torch's DistributedDataParallel.

    model = ringred.DistributedDataParallel(module)
    model.register_comm_hook(ringred.hooks.PowerSGD(model.comm, rank=2), ringred.hooks.comm_hook)

A policy defines how one bucket is reduced. Its reductions run one after the other, on a thread and a communicator of
the policy's own, while backward goes on. A reduction may compute, and communicate more than once. `policy.counters`
counts what the policy sent and received.
"""

# No `from __future__ import annotations` here: torch compares a hook's annotations with its own classes.
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ringred.communicator import Communicator
from ringred.data_parallel.compression import dequantised, largest, low_rank_shape, orthonormal, quantised, spread
from ringred.data_parallel.policy import Gradients, Policy, comm_hook
from ringred.data_parallel.replicas import average_tensors
from ringred.runtime.folds import ReduceOp
from ringred.runtime.futures import future_of
from ringred.runtime.select import share_bounds

__all__ = [
    "FusedOptimizer",
    "Gradients",
    "Half",
    "Int8",
    "LocalSGD",
    "Policy",
    "PowerSGD",
    "TopK",
    "all_reduce_hook",
    "comm_hook",
]


def all_reduce_hook(comm: Communicator, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """Averages the gradients of `bucket` over the ranks of `comm`.

        model = torch.nn.parallel.DistributedDataParallel(module)      # its process group may stay Gloo or NCCL
        model.register_comm_hook(ringred.init(), ringred.hooks.all_reduce_hook)

    Returns a future of the bucket's flat buffer, of which gradients are views; it fails as the
    all-reduce does. `comm` must have the ranks of the model's process group, in their order.
    """
    gradients: Tensor = bucket.buffer()
    work = comm.all_reduce(gradients, ReduceOp.AVG, async_op=True)

    def averaged() -> Tensor:
        work.wait()
        return gradients

    reduced: Future[Tensor] = future_of([work], averaged, [gradients.device])
    return reduced


def _real(flat: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones; real ones as they are."""
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


class Half(Policy):
    """Averages in 16 bits, for half of the bytes. `dtype` is float16 (divided before it is added) or bfloat16."""

    def __init__(self, comm: Communicator, dtype: torch.dtype = torch.float16) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"Half: expected torch.float16 or torch.bfloat16, got {dtype}")
        super().__init__(comm)
        self.dtype = dtype

    def reduce(self, comm: Communicator, gradients: Gradients) -> Tensor:
        flat = _real(gradients.flat)
        small = comm.empty(flat.numel(), self.dtype, flat.device).copy_(flat)
        comm.all_reduce(small, ReduceOp.AVG)
        flat.copy_(small)
        return gradients.flat


class Int8(Policy):
    """Sends 8 bits per element and a float32 scale per `block` elements: a little over a quarter of the bytes.

    Each rank gets its share of the bucket from every rank, quantised, adds these in float32 and rank order, and
    quantises the mean. The errors of both roundings are added to the next gradient (error feedback: Karimireddy et
    al., ICML 2019).
    """

    def __init__(self, comm: Communicator, block: int = 256) -> None:
        if block < 1:
            raise ValueError(f"Int8: expected a block of one element or more, got {block}")
        super().__init__(comm)
        self.block = block

    def reduce(self, comm: Communicator, gradients: Gradients) -> Tensor:
        flat, block = _real(gradients.flat), self.block
        count = -(-flat.numel() // block)
        bounds = share_bounds(count, comm.size)
        blocks = torch.zeros(count, block, dtype=torch.float32, device=flat.device)
        blocks.view(-1)[: flat.numel()] = flat
        values, scales = self._rounded("sent", gradients, blocks)
        outgoing = [_packed(values[lo:hi], scales[lo:hi]) for lo, hi in bounds]
        lo, hi = bounds[comm.rank]
        incoming = [torch.empty_like(outgoing[comm.rank]) for _ in range(comm.size)]
        comm.all_to_all(incoming, outgoing)
        mean = blocks.new_zeros(hi - lo, block)
        one = torch.empty_like(mean)
        for part in incoming:
            mean += dequantised(*_unpacked(part, block), out=one)
        mean /= comm.size
        values, scales = self._rounded("owned", gradients, mean)
        gathered = [incoming[0].new_empty((high - low) * (block + 4)) for low, high in bounds]
        comm.all_gather(gathered, _packed(values, scales))
        for part, (low, high) in zip(gathered, bounds, strict=True):
            dequantised(*_unpacked(part, block), out=blocks[low:high])
        flat.copy_(blocks.view(-1)[: flat.numel()])
        return gradients.flat

    def _rounded(self, name: str, gradients: Gradients, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Quantises `blocks` plus the last rounding error; the new rounding error is kept under `name`."""
        left_out = self.kept(name, gradients, blocks)
        blocks += left_out
        return quantised(blocks, left_out)


def _packed(values: Tensor, scales: Tensor) -> Tensor:
    return torch.cat([scales.view(torch.uint8), values.reshape(-1).view(torch.uint8)])


def _unpacked(message: Tensor, block: int) -> tuple[Tensor, Tensor]:
    count = message.numel() // (block + 4)
    scales, values = message[: 4 * count].view(torch.float32), message[4 * count :].view(torch.int8)
    return values.view(count, block), scales


class TopK(Policy):
    """Sends the fraction `ratio` of a bucket's elements with the greatest magnitudes, with their indices: 8 bytes per
    element. The others are kept and added to the next gradient (error feedback: Stich et al., NeurIPS 2018)."""

    def __init__(self, comm: Communicator, ratio: float = 0.01) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"TopK: expected 0 < ratio ≤ 1, got {ratio}")
        super().__init__(comm)
        self.ratio = ratio

    def reduce(self, comm: Communicator, gradients: Gradients) -> Tensor:
        flat = _real(gradients.flat)
        if not flat.numel():
            return gradients.flat
        left_out = self.kept("left out", gradients, flat)
        left_out += flat
        places, values = largest(left_out, max(1, int(self.ratio * flat.numel())))
        left_out[places] = 0
        left_out.nan_to_num_(0.0, 0.0, 0.0)
        mine = torch.cat([places, values.float().view(torch.int32)])
        everyone = [torch.empty_like(mine) for _ in range(comm.size)]
        comm.all_gather(everyone, mine)
        halves = [part.chunk(2) for part in everyone]
        spread([p for p, _ in halves], [v.view(torch.float32).to(flat.dtype) for _, v in halves], flat)
        flat /= comm.size
        return gradients.flat


class PowerSGD(Policy):
    """Sends each matrix as two factors of `rank` columns, and vectors uncompressed. The factors come from one step of
    the power method, starting from the factors of the step before. Their error is added to the next gradient.

    In the first `start` steps gradients are all-reduced uncompressed. Vogels, Karimireddy, Jaggi: PowerSGD (NeurIPS
    2019), algorithm 1.
    Each rank multiplies the factors itself: results are bitwise equal only if the ranks' linear algebra is.
    """

    def __init__(self, comm: Communicator, rank: int = 2, start: int = 0) -> None:
        if rank < 1 or start < 0:
            raise ValueError(f"PowerSGD: expected rank ≥ 1 and start ≥ 0, got {rank} and {start}")
        super().__init__(comm)
        self.columns, self.start_at = rank, start
        self._steps: dict[int, int] = {}

    def reduce(self, comm: Communicator, gradients: Gradients) -> Tensor:
        step = self._steps[gradients.number] = self._steps.get(gradients.number, -1) + 1
        if step < self.start_at:
            comm.all_reduce(gradients.flat, ReduceOp.AVG)
            return gradients.flat
        rank, flat = self.columns, gradients.flat
        wide = torch.float32 if flat.dtype in (torch.float16, torch.bfloat16) else flat.dtype
        left_out = self.kept("left out", gradients, flat.to(wide))
        left_out += flat
        lengths = [parameter.numel() for parameter in gradients.parameters]
        shapes = [low_rank_shape(parameter.shape, rank) for parameter in gradients.parameters]
        triples = list(zip(left_out.split(lengths), flat.split(lengths), shapes, strict=True))
        matrices = [(part.view(shape), out.view(shape)) for part, out, shape in triples if shape is not None]
        vectors = [(part, out) for part, out, shape in triples if shape is None]

        right = self.kept("right", gradients, left_out.new_empty(rank * sum(m.shape[1] for m, _ in matrices)))
        if not right.any():
            drawn = torch.empty(right.shape, dtype=right.dtype)  # the same on every rank, whatever its device
            right.copy_(drawn.normal_(generator=torch.Generator().manual_seed(gradients.number)))
        rights = _factors(right, [matrix.shape[1] for matrix, _ in matrices], rank)
        first = left_out.new_empty(rank * sum(m.shape[0] for m, _ in matrices) + sum(v.numel() for v, _ in vectors))
        lefts = _factors(first, [matrix.shape[0] for matrix, _ in matrices], rank)
        whole = first[rank * sum(m.shape[0] for m, _ in matrices) :].split([v.numel() for v, _ in vectors])
        for (matrix, _), before, left in zip(matrices, rights, lefts, strict=True):
            torch.mm(matrix, before, out=left)
        for (vector, _), place in zip(vectors, whole, strict=True):
            place.copy_(vector)
        comm.all_reduce(first, ReduceOp.AVG)
        for (matrix, _), left, after in zip(matrices, lefts, rights, strict=True):
            left.copy_(orthonormal(left))
            torch.mm(matrix.mH, left, out=after)
        comm.all_reduce(right, ReduceOp.AVG)
        for (matrix, out), left, after in zip(matrices, lefts, rights, strict=True):
            product = left @ after.mH
            matrix -= product
            out.copy_(product)
        for (vector, out), place in zip(vectors, whole, strict=True):
            out.copy_(place)
            vector.zero_()
        left_out.nan_to_num_(0.0, 0.0, 0.0)  # an overflow has reached all ranks, and is not kept
        right.nan_to_num_(0.0, 0.0, 0.0)
        return flat

    def state_dict(self) -> dict[str, Any]:
        """As `Policy.state_dict`, with the number of steps."""
        return {**super().state_dict(), "steps": dict(self._steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Policy.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._steps = dict(state_dict["steps"])


def _factors(flat: Tensor, lengths: list[int], rank: int) -> list[Tensor]:
    """The beginning of `flat` as matrices of `rank` columns; `lengths` are their numbers of rows."""
    found, at = [], 0
    for length in lengths:
        found.append(flat[at : at + length * rank].view(length, rank))
        at += length * rank
    return found


class LocalSGD(Policy):
    """Post-local SGD: for `start` steps of `optimizer`, gradients are averaged as usual. After that each rank steps
    with its own gradients, and every `period` steps the parameters are averaged instead (Lin et al., ICLR 2020).

    If `within` is given, for instance a communicator of the ranks of one host, gradients are still averaged among its
    ranks; this traffic is not in `counters`. The optimizer's state (momentum) is not averaged. All ranks must make the
    same steps, so this does not work with `join()`, nor with a `GradScaler`, which skips some steps.
    """

    joins = False

    def __init__(
        self,
        comm: Communicator,
        optimizer: torch.optim.Optimizer,
        *,
        start: int = 0,
        period: int = 4,
        within: Communicator | None = None,
    ) -> None:
        if start < 0 or period < 1:
            raise ValueError(f"LocalSGD: expected start ≥ 0 and period ≥ 1, got {start} and {period}")
        super().__init__(comm)
        self.start_at, self.period, self.steps = start, period, 0
        self._within = within.duplicate() if within is not None else None
        optimizer.register_step_post_hook(self._after_step)

    def reduce(self, comm: Communicator, gradients: Gradients) -> Tensor:
        among = comm if self.steps < self.start_at else self._within
        if among is not None:
            among.all_reduce(gradients.flat, ReduceOp.AVG)
        return gradients.flat

    def state_dict(self) -> dict[str, Any]:
        """As `Policy.state_dict`, with the number of steps."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Policy.load_state_dict`."""
        super().load_state_dict(state_dict)
        self.steps = state_dict["steps"]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if self.steps >= self.start_at and (self.steps - self.start_at) % self.period == 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._lane.submit(lambda comm: average_tensors(comm, parameters), device=parameters[0].device).wait()


class FusedOptimizer(Policy):
    """Steps `optimizer` for the parameters of a bucket as soon as that bucket is reduced, while backward goes on: the
    program must not call `optimizer.step()`. `by` is another policy that does the reduction, by default an all-reduce.

    Learning-rate schedules work as usual. `optimizer` must have exactly the parameters of the model and step each of
    them independently. This does not work with anything that needs all gradients before the step (clipping by the norm,
    `GradScaler`), with find_unused_parameters or check_finite, or with gradients accumulated over several synchronised
    passes.
    """

    needs_all_gradients = True

    def __init__(self, comm: Communicator, optimizer: torch.optim.Optimizer, by: Policy | None = None) -> None:
        if isinstance(by, (FusedOptimizer, LocalSGD)):
            raise ValueError(f"FusedOptimizer: expected a policy that reduces gradients, got {type(by).__name__}")
        super().__init__(comm)
        self.optimizer, self._by = optimizer, by

    def attach(self, comm: Communicator, parameters: Sequence[Tensor]) -> None:
        """As `Policy.attach`; the optimizer must have just these parameters."""
        super().attach(comm, parameters)
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}
        missing, strange = {id(p) for p in parameters} - stepped, stepped - {id(p) for p in parameters}
        if missing or strange:
            raise ValueError(
                f"rank {self.rank}: FusedOptimizer: expected an optimizer of the model's parameters, but it lacks "
                f"{len(missing)} of them and has {len(strange)} others"
            )

    def reduce(self, comm: Communicator, gradients: Gradients) -> Tensor:
        if self._by is None:
            comm.all_reduce(gradients.flat, ReduceOp.AVG)
        else:
            mean = self._by.reduce(comm, gradients)
            if mean is not gradients.flat:
                gradients.flat.copy_(mean)
        self._step(gradients)
        return gradients.flat

    def _step(self, gradients: Gradients) -> None:
        """Steps the optimizer for the parameters of this bucket alone, with their reduced gradients."""
        mine = {id(parameter) for parameter in gradients.parameters}
        groups = self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        kept = [parameter.grad for parameter in gradients.parameters]
        try:
            for parameter, gradient in zip(gradients.parameters, gradients.views, strict=True):
                parameter.grad = gradient
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = [parameter for parameter in parameters if id(parameter) in mine]
            self.optimizer.param_groups = [group for group in groups if group["params"]]
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = parameters
            for parameter, before in zip(gradients.parameters, kept, strict=True):
                parameter.grad = before
