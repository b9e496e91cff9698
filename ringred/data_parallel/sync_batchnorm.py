"""Batch normalisation over the batches of all ranks, on CPUs too, where torch's SyncBatchNorm does not work."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringred.communicator import Communicator, default_communicator
from ringred.runtime.compiling import not_compiled

__all__ = ["SyncBatchNorm"]

_beside: weakref.WeakKeyDictionary[Communicator, Communicator] = weakref.WeakKeyDictionary()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of any dimension whose statistics, in training, are those of the batches of all ranks together.

        model = ringred.SyncBatchNorm.convert_sync_batchnorm(model)
        model = ringred.DistributedDataParallel(model)

    `process_group` is a `Communicator` or a torch process group; by default `ringred.init()`'s communicator. The
    layers of one group share a duplicate of its communicator, because they communicate in forward and backward, while
    gradients are reduced. Batches may differ in size. The input is [N, C, ...] of a floating dtype; statistics are
    computed in float32 or wider. Constructing the first layer of a group is collective, and so are forward (in
    training) and backward.

    Ioffe and Szegedy (ICML 2015); variances are combined as in Chan, Golub, LeVeque (1979).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.comm: Communicator | None = _beside_of(process_group)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Returns `module` with each BatchNorm layer replaced by a SyncBatchNorm with its parameters and statistics."""
        converted: nn.Module = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, cls):
            if isinstance(module.weight, nn.parameter.UninitializedParameter):
                raise ValueError(
                    "SyncBatchNorm: expected initialised layers, got a lazy one: run a forward pass before"
                )
            settings = (module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
            converted = cls(*settings, process_group)
            converted.train(module.training)
            if module.affine:
                converted.weight, converted.bias = module.weight, module.bias
            converted.running_mean, converted.running_var = module.running_mean, module.running_var
            converted.num_batches_tracked = module.num_batches_tracked
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "comm": None}  # loaded in another process, it uses the default communicator

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = {**copy.deepcopy(self.__getstate__(), memo), "comm": self.comm}
        return copied

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"SyncBatchNorm: expected [N, {self.num_features}, ...], got {list(input.shape)}")

    @not_compiled(callees=True)
    def forward(self, input: Tensor) -> Tensor:
        """`input`, normalised; see the class."""
        self._check_input_dim(input)
        if not self.training:  # uses the running statistics, or this batch's if none are tracked
            mean, variance, alone = self.running_mean, self.running_var, self.running_mean is None
            return F.batch_norm(input, mean, variance, self.weight, self.bias, alone, 0.0, self.eps)
        if self.comm is None:
            self.comm = _beside_of(None)
        normalise: Any = _Normalise.apply
        output, mean, variance, count = normalise(input, self.weight, self.bias, self.eps, self.comm)
        if self.running_mean is not None:
            self._track(mean, variance, count)
        result: Tensor = output
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None, "statistics are tracked"
        assert self.running_var is not None, "statistics are tracked"
        assert self.num_batches_tracked is not None, "statistics are tracked"
        self.num_batches_tracked += 1
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), factor)


def _beside_of(process_group: Any) -> Communicator:
    """The duplicate of the process group's communicator that all SyncBatchNorm layers of the group share."""
    comm = default_communicator(process_group)
    known = _beside.get(comm)
    if known is None or known.closed:
        known = _beside[comm] = comm.duplicate()
    return known


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Communicator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _wide(input)
        channels, own = wide.shape[1], wide.numel() // wide.shape[1]
        dims = [0, *range(2, wide.dim())]
        mine = wide.new_zeros(2 * channels + 1)
        if own:
            variance, mean = torch.var_mean(wide, dims, correction=0)
            mine[:channels], mine[channels:-1], mine[-1] = mean, variance * own, own
        table = mine.new_empty(comm.size * mine.numel())
        comm.all_gather(table, mine)
        rows = table.view(comm.size, -1)
        means, squares, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        count = counts.sum()
        if own < 2 and count < 2:  # in this order: to look at `count` is to wait for the device
            raise ValueError(f"SyncBatchNorm: expected more than 1 value per channel in training, got {int(count)}")
        mean = (means * counts).sum(0) / count
        variance = (squares.sum(0) + ((means - mean).square() * counts).sum(0)) / count
        output = F.batch_norm(wide, mean, variance, _or_none(weight, wide), _or_none(bias, wide), False, 0.0, eps)
        ctx.save_for_backward(input, weight, mean, (variance + eps).rsqrt())
        ctx.count, ctx.comm, ctx.dims, ctx.biased = count, comm, dims, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd = ctx.saved_tensors
        shape = [1, -1, *([1] * (input.dim() - 2))]
        slope, apart = _wide(gradient), _wide(input) - mean.view(shape)
        sums = torch.stack([slope.sum(ctx.dims), (slope * apart).sum(ctx.dims)])
        bias_gradient, weight_gradient = sums[0].clone(), sums[1] * invstd
        ctx.comm.all_reduce(sums)
        sums /= ctx.count
        scale = invstd if weight is None else invstd * weight
        centred = slope - sums[0].view(shape) - apart * (sums[1] * invstd.square()).view(shape)
        input_gradient = (centred * scale.view(shape)).to(input.dtype)
        if weight is None:
            return input_gradient, None, None, None, None
        ends = (bias_gradient.to(weight.dtype) if ctx.biased else None), None, None
        return input_gradient, weight_gradient.to(weight.dtype), *ends


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _or_none(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)
