"""Converts the arguments of DistributedDataParallel to its settings; refuses invalid values with a reason."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ringred.buckets import FIRST_BUCKET_BYTES, MIB
from ringred.collectives.registry import algorithms, lookup
from ringred.data_parallel.layout import Members, Settings
from ringred.data_parallel.policy import Policy
from ringred.data_parallel.sync_batchnorm import SyncBatchNorm
from ringred.errors import UnknownAlgorithm, UnsupportedTensor
from ringred.runtime.folds import ReduceOp, reduce_op
from ringred.runtime.select import AUTOMATIC, RANK_ORDER
from ringred.transports.cuda import joining

__all__ = [
    "BucketPlan",
    "algorithm_of",
    "as_text",
    "bucket_caps",
    "check_goes_with",
    "check_hook",
    "check_parameters",
    "check_supported",
    "group_asked_for",
    "members_of",
    "op_of",
    "read_plan",
    "special_parameters",
    "warn_of_ignored",
    "write_plan",
]

_DEFAULT_CAP_MB = 25

BucketPlan = Sequence[Sequence[str]]
"""The names of the parameters, bucket by bucket, in the order in which buckets are reduced."""


def check_parameters(named: Sequence[tuple[str, Tensor]], device_ids: Any, output_device: Any) -> torch.device | None:
    """The device that inputs are moved to; None if they stay where they are. Raises for parameters that cannot be
    reduced, and for device arguments that do not fit them, as torch does."""
    if device_ids is not None and len(device_ids) > 1:
        raise ValueError("device_ids can only be None or contain a single element.")
    where: torch.device | None = None
    for name, parameter in named:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise RuntimeError(
                f"parameter {name!r} is uninitialized: run a dummy forward pass before wrapping the module"
            )
        where = where or parameter.device
        if parameter.device != where or (where.type != "cpu" and where.type not in joining.DRIVERS):
            expected = "on the CPU or a CUDA device" if parameter.device == where else f"on {where}, as those before"
            raise UnsupportedTensor(f"parameter {name!r}: expected it {expected}, got {parameter.device}")
    if (not device_ids and output_device is None) or where is None:
        return None
    given = [*(device_ids or ()), *([] if output_device is None else [output_device])]
    asked = [torch.device(where.type, one) if isinstance(one, int) else torch.device(one) for one in given]
    if where.type == "cpu" or any(joining.with_index(one) != where for one in asked):
        raise ValueError(
            f"device_ids and output_device only work with GPU modules on that device, but got device_ids {device_ids}, "
            f"output_device {output_device}, and parameters on {'the CPU' if where.type == 'cpu' else where}"
        )
    return where if device_ids else None


def check_supported(mixed_precision: Any, lazy_bucket_allocation: bool) -> None:
    """Raises `ValueError` for arguments of torch's that ringred does not take."""
    if mixed_precision is not None:
        raise ValueError(
            "mixed_precision is not supported: torch's own needs an accelerator. torch.autocast computes in 16 "
            "bits, ringred.hooks.Half reduces in 16 bits"
        )
    if lazy_bucket_allocation:
        raise ValueError(
            "lazy_bucket_allocation is not supported: buckets lie in memory that ranks share, and their plans are "
            "made at construction"
        )


def warn_of_ignored(check_reduction: bool, buffers_said_twice: bool) -> None:
    """Warns the caller of DistributedDataParallel of arguments that have no effect."""
    if check_reduction:
        warnings.warn("check_reduction has no effect; it is deprecated in torch too", FutureWarning, stacklevel=3)
    if buffers_said_twice:
        warnings.warn("broadcast_buffers is ignored beside forward_sync_buffers", FutureWarning, stacklevel=3)


def group_asked_for(process_group: Any, device_mesh: Any) -> Any:
    """The process group or communicator that the two arguments select; None selects the default."""
    if device_mesh is None:
        return process_group
    if process_group is not None:
        raise RuntimeError("Cannot specify both process_group and device_mesh arguments.")
    if device_mesh.ndim != 1:
        raise RuntimeError(f"Only 1D device mesh is supported, but got {device_mesh}.")
    if device_mesh._get_root_mesh() != device_mesh:
        raise ValueError(
            "a device_mesh that is part of another is not supported: its parameters are DTensors. torch's DDP on "
            'backend="ringred" takes it'
        )
    return device_mesh.get_group(mesh_dim=0)


def members_of(
    module: nn.Module,
    named: Sequence[tuple[str, Tensor]],
    delayed: Sequence[tuple[str, Tensor]] | None,
    trigger: Tensor | None,
) -> Members:
    """The parameters to reduce: those of `named` that require a gradient, and the delayed ones."""
    if (delayed is None) != (trigger is None):
        raise ValueError("delay_all_reduce_named_params and param_to_hook_all_reduce need to be set at the same time.")
    later = {id(parameter): name for name, parameter in delayed or ()}
    parameters = [(name, p) for name, p in named if p.requires_grad]
    known = {id(parameter) for _, parameter in parameters}
    unknown = [name for name, parameter in delayed or () if id(parameter) not in known]
    if unknown:
        raise ValueError(f"delay_all_reduce_named_params: {unknown[0]!r} is no parameter of the module with a gradient")
    if trigger is not None and not trigger.requires_grad:
        raise ValueError("param_to_hook_all_reduce: expected a parameter that requires a gradient")
    if not parameters:
        raise RuntimeError(
            "DistributedDataParallel is not needed when a module doesn't have any parameter that requires a gradient."
        )
    rows = _sparse(module)
    return Members(
        tuple(name for name, _ in parameters),
        tuple(parameter for _, parameter in parameters),
        frozenset(at for at, (_, p) in enumerate(parameters) if id(p) in rows),
        tuple(at for at, (_, p) in enumerate(parameters) if id(p) in later),
        trigger,
    )


def _sparse(module: nn.Module) -> set[int]:
    """The ids of the parameters whose gradients will be sparse, as torch tells them."""
    embeddings = [m for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    return {id(embedding.weight) for embedding in embeddings}


def special_parameters(
    module: nn.Module, delayed: Sequence[tuple[str, Tensor]] | None, trigger: Tensor | None
) -> list[str]:
    """The settings of individual parameters, as text that the ranks compare."""
    rows, later = _sparse(module), {id(parameter) for _, parameter in delayed or ()}
    return [
        f"parameter {name!r}: sparse {id(p) in rows}, delayed {id(p) in later}, param_to_hook_all_reduce {p is trigger}"
        for name, p in module.named_parameters()
        if id(p) in rows or id(p) in later or p is trigger
    ]


def bucket_caps(cap_mb: float | None, caps_mb: Sequence[float] | None) -> tuple[int, ...]:
    """The caps of the buckets in bytes: torch's 1 and 25 MiB where none is given."""
    given = list(caps_mb) if caps_mb else [cap_mb] if cap_mb is not None else []
    for cap in given:
        if not cap > 0:
            what = "bucket_cap_mb_list" if caps_mb else "bucket_cap_mb"
            raise ValueError(f"DistributedDataParallel: expected {what} > 0, got {cap}")
    return tuple(int(cap * MIB) for cap in given) or (FIRST_BUCKET_BYTES, _DEFAULT_CAP_MB * MIB)


def op_of(given: str | ReduceOp) -> ReduceOp:
    """The reduce operation, which must be avg or sum."""
    op = reduce_op(given, "DistributedDataParallel")
    if op not in (ReduceOp.AVG, ReduceOp.SUM):
        raise ValueError(f"DistributedDataParallel: expected reduce_op 'avg' or 'sum', got {op.value!r}")
    return op


def algorithm_of(algorithm: str, grid: Sequence[int] | None, deterministic: bool) -> str:
    """The algorithm to use. With `deterministic` it must add in rank order; raises `UnknownAlgorithm` for others, whose
    sums depend on where an element lies in its bucket."""
    if not deterministic:
        return algorithm
    names = sorted(name for name, entry in algorithms("all_reduce").items() if entry.rank_order)
    if grid is not None or (algorithm not in AUTOMATIC and not lookup("all_reduce", algorithm).rank_order):
        asked = f"grid={tuple(grid)}" if grid is not None else f"algorithm={algorithm!r}"
        raise UnknownAlgorithm(
            f"deterministic=True does not go with {asked}: it adds an element in an order that depends on where the "
            "element lies, so that the bits change with the buckets. Those that add in rank order are "
            f"{', '.join(names)}"
        )
    return RANK_ORDER if algorithm == "auto" else algorithm


def recovers(on_failure: str, module: nn.Module, as_views: bool) -> bool:
    """Whether ranks go on after a failure. Raises `ValueError` if the model cannot."""
    if on_failure not in ("raise", "shrink"):
        raise ValueError(f"DistributedDataParallel: on_failure is 'raise' or 'shrink', got {on_failure!r}")
    if on_failure == "raise":
        return False
    if as_views:
        raise ValueError(
            "on_failure='shrink' does not go with gradient_as_bucket_view=True: a step is repeated from the gradients "
            "of each rank, which a failed reduction of views leaves half reduced"
        )
    if any(isinstance(part, (SyncBatchNorm, nn.SyncBatchNorm)) for part in module.modules()):
        raise ValueError(
            "on_failure='shrink' does not go with SyncBatchNorm: it communicates within forward and backward, which "
            "cannot be repeated in part"
        )
    return True


def as_text(settings: Settings, desync_check_every: int, plan: BucketPlan | str | Path | None) -> list[str]:
    """What must be the same on all ranks, as text that they compare; of a plan in a file, its contents if it exists."""
    if desync_check_every < 0:
        raise ValueError(f"DistributedDataParallel: expected desync_check_every ≥ 0, got {desync_check_every}")
    if isinstance(plan, (str, Path)):
        plan_text = Path(plan).read_text() if Path(plan).exists() else "in a file that is not there"
    else:
        plan_text = str(plan)
    return [
        *(f"{field.name}={getattr(settings, field.name)}" for field in dataclasses.fields(settings)),
        f"desync_check_every={desync_check_every}",
        f"bucket plan {plan_text}",
    ]


def read_plan(plan: BucketPlan | str | Path, members: Members) -> list[list[int]]:
    """The places of the parameters that `plan`, or a file, names. Raises `ValueError` if it is of another model."""
    buckets: BucketPlan = json.loads(Path(plan).read_text())["buckets"] if isinstance(plan, (str, Path)) else plan
    place = {name: at for at, name in enumerate(members.names)}
    named = [name for bucket in buckets for name in bucket]
    odd = sorted(set(named) ^ set(members.names)) or sorted({name for name in named if named.count(name) > 1})
    if odd:
        raise ValueError(f"bucket_plan: expected every parameter of the model once, but not so {odd[0]!r}")
    found = [[place[name] for name in bucket] for bucket in buckets if bucket]
    for places in found:
        kinds = {(members.parameters[at].dtype, at in members.delayed) for at in places}
        if len(kinds) > 1 or (len(places) > 1 and not members.sparse.isdisjoint(places)):
            raise ValueError(f"bucket_plan: {members.names[places[0]]!r} shares a bucket with others of another kind")
    return found


def write_plan(path: str | Path, plan: BucketPlan, rank: int) -> None:
    """Writes `plan` to the file `path` (JSON), whole or not at all."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.rank{rank}")
    unfinished.write_text(json.dumps({"buckets": plan}, indent=1) + "\n")
    unfinished.replace(path)


def check_goes_with(state: Any, settings: Settings) -> None:
    """Raises `ValueError` if a hook with this `state`, which may be a policy, does not go with `settings`."""
    if settings.op is ReduceOp.SUM or settings.deterministic:
        raise ValueError("a communication hook reduces by itself: reduce_op and deterministic say nothing to it")
    if isinstance(state, Policy) and state.needs_all_gradients and (settings.find_unused or settings.check_finite):
        raise ValueError(
            f"{type(state).__name__} does not go with find_unused_parameters or check_finite: it acts before it is "
            "known whether gradients count"
        )


def check_hook(hook: Callable[..., Any]) -> None:
    """Raises `TypeError` or `ValueError` if `hook` is not a communication hook, as torch does."""
    if not callable(hook):
        raise TypeError("Communication hook must be callable.")
    signature = inspect.signature(hook)
    bucket, theirs = signature.parameters.get("bucket"), getattr(torch.distributed, "GradBucket", None)
    if bucket is not None and not _may_be(bucket.annotation, theirs):
        raise ValueError("Communication hook: bucket annotation should be dist.GradBucket.")
    if not _may_be(signature.return_annotation, torch.futures.Future[torch.Tensor]):
        raise ValueError("Communication hook: return annotation should be torch.futures.Future[torch.Tensor].")


def _may_be(annotation: Any, expected: Any) -> bool:
    return annotation in (inspect.Parameter.empty, expected, Any) or isinstance(annotation, str)
