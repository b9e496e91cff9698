"""Optimizers for data-parallel training: state sharded over the ranks (ZeRO-1), and the linear-scaling rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ringred.buckets import Bucket
from ringred.collectives.registry import lookup
from ringred.data_parallel.elementwise import ELEMENTWISE
from ringred.data_parallel.reductions import Share
from ringred.ddp import DistributedDataParallel
from ringred.errors import ModelMismatch
from ringred.runtime.select import AUTOMATIC

__all__ = ["ShardedOptimizer"]


class _Shard:
    """One bucket: its parameters in one flat tensor, of which this rank steps its share, piece by piece.

    `runs` are the (group, begin, end) of consecutive parameters of one parameter group; a piece is the part of a run
    that lies in this rank's share.
    """

    def __init__(self, bucket: Bucket, flat: Tensor, share: Share, runs: Sequence[tuple[int, int, int]]) -> None:
        self.bucket, self.flat, self.share = bucket, flat, share
        lo, hi = share.own
        self.spans = [(g, max(begin, lo), min(end, hi)) for g, begin, end in runs if max(begin, lo) < min(end, hi)]
        self.pieces = [nn.Parameter(flat[first:last]) for _, first, last in self.spans]
        self._gradients = [share.gradient[first - lo : last - lo] for _, first, last in self.spans]
        self.optimizer: torch.optim.Optimizer | None = None

    def step(self, options: Callable[[int], dict[str, Any]]) -> None:
        """Steps the pieces with the reduced gradients, if any; `options(group)` are a group's current settings."""
        if self.optimizer is None:
            return
        for piece, gradient in zip(self.pieces, self._gradients, strict=True):
            piece.grad = gradient if self.share.holds else None
        for own, (group, _, _) in zip(self.optimizer.param_groups, self.spans, strict=True):
            own.update(options(group))
        self.optimizer.step()

    def state(self, name: str, like: Tensor) -> Tensor:
        """This rank's share of the optimizer state `name`, one value per element; zeros where there is none."""
        lo, hi = self.share.own
        own = torch.zeros(hi - lo, dtype=like.dtype, device=self.flat.device)
        for piece, (_, first, last) in zip(self.pieces, self.spans, strict=True):
            assert self.optimizer is not None, "there is one where there are pieces"
            value = self.optimizer.state[piece].get(name)
            if isinstance(value, Tensor):
                own[first - lo : last - lo] = value
        return own


class ShardedOptimizer(torch.optim.Optimizer):
    """Steps a DistributedDataParallel's parameters; each of P ranks steps its own share, so that the optimizer's state
    takes 1/P of the memory.

        model = ringred.DistributedDataParallel(module)
        optimizer = ringred.optim.ShardedOptimizer(model, torch.optim.AdamW, lr=3e-4)

    Buckets are reduce-scattered instead of all-reduced, still while backward goes on. `step` updates this rank's share
    of one bucket while the shares of the buckets before it are all-gathered. After backward `.grad` is None, because
    the mean gradient is sharded over the ranks; the method `clip_grad_norm_` clips it. `groups` are parameter groups
    as torch's optimizers take them, by default all parameters of the model; torch's schedulers work on `param_groups`.
    A `GradScaler` fails, because it finds no gradients.

    `kind` is a torch optimizer that treats each element independently, as SGD and the Adams do; `elementwise=True`
    declares this for other optimizers. Raises `ValueError` otherwise, and for a model with find_unused_parameters,
    static_graph, sparse or delayed gradients, whose parameters may get no gradient. All ranks must construct it, before
    the first backward; it fixes the buckets.

    Rajbhandari et al., ZeRO: memory optimizations toward training trillion parameter models (SC 2020), stage 1.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        kind: type[torch.optim.Optimizer],
        groups: Iterable[Any] | None = None,
        *,
        elementwise: bool = False,
        **defaults: Any,
    ) -> None:
        if not elementwise and kind not in ELEMENTWISE:
            names = ", ".join(sorted(known.__name__ for known in ELEMENTWISE))
            raise ValueError(
                f"ShardedOptimizer: expected an optimizer that treats each element by itself ({names}), got "
                f"{kind.__name__}; elementwise=True vouches for it"
            )
        reducer, settings = model.reducer, model.reducer.settings
        members = reducer.members
        if reducer.layout.shares is not None:
            raise ValueError("ShardedOptimizer: the model has one already, which steps all of its parameters")
        if settings.algorithm not in AUTOMATIC:
            lookup("reduce_scatter", settings.algorithm)  # raises, with the known names, if there is none of this name
        if settings.find_unused or settings.static_graph or members.sparse or members.delayed or reducer.layout.hooked:
            raise ValueError(
                "ShardedOptimizer: every gradient must come in every backward: find_unused_parameters, static_graph, "
                "sparse or delayed gradients and communication hooks do not go with it"
            )
        self.model, self.comm = model, model.comm
        probe = kind([nn.Parameter(torch.zeros(1))], **defaults)
        self._complete = False
        super().__init__(members.parameters if groups is None else groups, probe.defaults)
        group_of = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        strange = [name for name, p in zip(members.names, members.parameters, strict=True) if id(p) not in group_of]
        if strange:
            raise ValueError(f"ShardedOptimizer: expected all parameters of the model, but not {strange[0]!r}")
        known = {id(p) for p in members.parameters}
        others = [p for group in self.param_groups for p in group["params"] if id(p) not in known and p.requires_grad]
        if others:
            raise ValueError(
                f"ShardedOptimizer: expected parameters of the model alone, but {len(others)} of `groups` are none, "
                f"the first of shape {list(others[0].shape)}"
            )
        groups_by_place = [group_of[id(p)] for p in members.parameters]
        # Parameters of one group lie side by side, so that a share has few pieces.
        plan = [sorted(indices, key=groups_by_place.__getitem__) for indices in reducer.layout.plan]
        shares = reducer.shard(plan)
        self._kind, self._defaults = kind, defaults
        self._stepped = False
        self._group_of_place = groups_by_place
        self._places: list[tuple[str, Tensor, Tensor]] = []
        self._shards: list[_Shard] = []
        for bucket, share in zip(reducer.layout.buckets, shares, strict=True):
            assert isinstance(bucket, Bucket), "no gradient is sparse"
            shard = _Shard(bucket, self._moved(bucket), share, self._runs(bucket))
            if shard.pieces:
                own = [
                    {"params": [p], **self._options(g)} for p, (g, _, _) in zip(shard.pieces, shard.spans, strict=True)
                ]
                shard.optimizer = kind(own, **defaults)
            self._shards.append(shard)
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but during construction only. Later it raises `ValueError`: shares are already assigned."""
        if self._complete:
            raise ValueError("ShardedOptimizer: no group can be added: all parameters of the model are in one")
        super().add_param_group(param_group)

    def _moved(self, bucket: Bucket) -> Tensor:
        """Moves the parameters of `bucket` into one flat tensor, to the places that their gradients have there."""
        members = self.model.reducer.members
        flat = self.comm.empty(bucket.flat.numel(), bucket.flat.dtype, bucket.flat.device)
        for index, view in zip(bucket.indices, bucket.views_in(flat), strict=True):
            view.copy_(members.parameters[index].detach())
            members.parameters[index].data = view
            self._places.append((members.names[index], members.parameters[index], view))
        return flat

    def _check_places(self) -> None:
        """Raises `RuntimeError` if a parameter was moved to other memory, where steps would not update it."""
        for name, parameter, view in self._places:
            if parameter.data_ptr() != view.data_ptr() or parameter.dtype != view.dtype:
                raise RuntimeError(
                    f"rank {self.comm.rank}: ShardedOptimizer: expected parameter {name!r} where it was put, as "
                    f"{view.dtype}, got one of {parameter.dtype} elsewhere: the module was converted or moved (to(), "
                    "half(), vector_to_parameters()) after the optimizer was made. Do that before"
                )

    def _runs(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        runs, begin = [], 0
        for group, indices in groupby(bucket.indices, self._group_of_place.__getitem__):
            end = begin + sum(self.model.reducer.members.parameters[index].numel() for index in indices)
            runs.append((group, begin, end))
            begin = end
        return runs

    def _options(self, number: int) -> dict[str, Any]:
        return {name: value for name, value in self.param_groups[number].items() if name != "params"}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters: this rank's share of one bucket while the buckets before it are gathered. Collective.

        It consumes the gradients: the next ones are not added to them, whether or not `zero_grad` is called.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_places()
        gathering = []
        for shard in self._shards:
            shard.step(self._options)
            shares = [shard.flat[lo:hi] for lo, hi in shard.share.bounds]
            gathering.append(self.comm.all_gather(shares, shares[self.comm.rank], async_op=True))
        for work in gathering:
            assert work is not None, "asynchronous calls return their work"
            work.wait()
        self._stepped = True
        self.model.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients: those in `.grad` of unsynchronised passes, and the reduced ones in the shares."""
        super().zero_grad(set_to_none)
        self.model.zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the reduced gradients so that the 2-norm of all of them is at most `max_norm`; returns the norm
        before, in float64. Use it instead of `torch.nn.utils.clip_grad_norm_`, which finds no gradients. Collective."""
        squares = torch.zeros(1, dtype=torch.float64)
        held = [shard.share.gradient for shard in self._shards if shard.share.holds]
        for gradient in held:
            real = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            squares += torch.linalg.vector_norm(real, dtype=torch.float64).square().cpu()
        self.comm.all_reduce(squares)
        norm = squares.sqrt().squeeze(0)
        coefficient = min(1.0, max_norm / (norm.item() + 1e-6))
        if held and coefficient < 1.0:
            torch._foreach_mul_(held, coefficient)
        return norm

    def kept(self, group: int | None = None) -> list[dict[str, Any]]:
        """The optimizer state on this rank, one dict per piece of its shares; of one parameter group, or of all."""
        return [
            shard.optimizer.state[piece]
            for shard in self._shards
            if shard.optimizer is not None
            for piece, (number, _, _) in zip(shard.pieces, shard.spans, strict=True)
            if piece in shard.optimizer.state and group in (number, None)
        ]

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank's shares. Only the same rank of a job with the same number of ranks can load it; use
        `full_state_dict` for a state that any number of ranks can load."""
        layout = [self._names(shard) for shard in self._shards]
        own = [None if shard.optimizer is None else shard.optimizer.state_dict() for shard in self._shards]
        options = [self._options(number) for number in range(len(self.param_groups))]
        return {
            "rank": self.comm.rank,
            "size": self.comm.size,
            "layout": layout,
            "shards": own,
            "groups": options,
            "stepped": self._stepped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of this rank gave. Raises `ModelMismatch` if that was another rank or model."""
        mine = {"rank": self.comm.rank, "size": self.comm.size, "layout": [self._names(s) for s in self._shards]}
        for what, expected in mine.items():
            if state_dict.get(what) != expected:
                raise ModelMismatch(
                    f"rank {self.comm.rank}: ShardedOptimizer: expected the state of {what} {expected}, got "
                    f"{state_dict.get(what)}; full_state_dict() makes one for any number of ranks"
                )
        for shard, own in zip(self._shards, state_dict["shards"], strict=True):
            if shard.optimizer is not None:
                shard.optimizer.load_state_dict(own)
        for group, options in zip(self.param_groups, state_dict["groups"], strict=True):
            group.update(options)
        self._stepped = state_dict["stepped"]

    def full_state_dict(self, dst: int = 0) -> dict[str, Any] | None:
        """On rank `dst` the state as an unsharded `kind(groups)` has it, on other ranks None. Collective."""
        place = self._place_of_parameter()
        parameters = self.model.reducer.members.parameters
        state: dict[int, dict[str, Any]] = {}
        for shard in self._shards:
            for name, kinds in self._kinds(shard).items():
                like = next(iter(kinds.values()))
                own = shard.state(name, like)
                parts = [own.new_empty(hi - lo) for lo, hi in shard.share.bounds] if self.comm.rank == dst else None
                self.comm.gather(own, parts, dst)
                if parts is None:
                    continue
                for index, view in zip(shard.bucket.indices, shard.bucket.views_in(torch.cat(parts)), strict=True):
                    if self._group_of_place[index] in kinds and view.numel():
                        value = view.clone() if like.dim() else view.flatten()[0].to(like.device, copy=True)
                        state.setdefault(place[id(parameters[index])], {})[name] = value
        if self.comm.rank != dst:
            return None
        groups, first = [], 0
        for number, group in enumerate(self.param_groups):
            count = len(group["params"])
            groups.append({**self._options(number), "params": list(range(first, first + count))})
            first += count
        return {"state": state, "param_groups": groups}

    def load_full_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `full_state_dict` gave, or the `state_dict` of an optimizer without shares; each rank takes what
        its shares need of it. Raises `ModelMismatch` if it is of another model."""
        place = self._place_of_parameter()
        parameters = self.model.reducer.members.parameters
        state = state_dict["state"]
        self._check_fits(state, [len(group["params"]) for group in state_dict["param_groups"]])
        for shard in self._shards:
            indices = shard.bucket.indices
            held = [state.get(place[id(parameters[index])], {}) for index in indices]
            for name in {name for each in held for name, value in each.items() if isinstance(value, Tensor)}:
                like = next(each[name] for each in held if name in each)
                whole = torch.zeros(shard.flat.numel(), dtype=like.dtype, device=shard.flat.device)
                for view, each in zip(shard.bucket.views_in(whole), held, strict=True):
                    if name in each:
                        view.copy_(each[name])
                for piece, (number, first, last) in zip(shard.pieces, shard.spans, strict=True):
                    assert shard.optimizer is not None, "there is one where there are pieces"
                    part = whole[first:last].clone()
                    if not like.dim():
                        own = self.param_groups[number]
                        # As in torch, counts of steps stay on the host, unless the optimizer wants them on the device.
                        part = part[0] if own.get("capturable") or own.get("fused") else part[0].cpu()
                    shard.optimizer.state[piece][name] = part
        for group, options in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in options.items() if name != "params"})
        self._stepped = True

    def _check_fits(self, state: dict[int, dict[str, Any]], lengths: list[int]) -> None:
        mine = [len(group["params"]) for group in self.param_groups]
        if lengths != mine:
            raise ModelMismatch(
                f"rank {self.comm.rank}: ShardedOptimizer: expected groups of {mine} parameters, got {lengths}"
            )
        everyone = [p for group in self.param_groups for p in group["params"]]
        for at, kept in state.items():
            for name, value in kept.items():
                fits = not isinstance(value, Tensor) or not value.dim() or value.shape == everyone[at].shape
                if not fits:
                    raise ModelMismatch(
                        f"rank {self.comm.rank}: ShardedOptimizer: expected {name!r} of parameter {at} to be "
                        f"{list(everyone[at].shape)}, got {list(value.shape)}"
                    )

    def _names(self, shard: _Shard) -> list[str]:
        return [self.model.reducer.members.names[index] for index in shard.bucket.indices]

    def _place_of_parameter(self) -> dict[int, int]:
        return {id(p): at for at, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def _kinds(self, shard: _Shard) -> dict[str, dict[int, Tensor]]:
        """The names of the state tensors that the optimizer keeps for `shard`, each with an example tensor per
        parameter group. The result is the same on all ranks, also on those without a piece of `shard`."""
        found: dict[str, dict[int, Tensor]] = {}
        for group in sorted({self._group_of_place[index] for index in shard.bucket.indices}) if self._stepped else ():
            trial = nn.Parameter(torch.zeros(1, dtype=shard.flat.dtype, device=shard.flat.device))
            trial.grad = torch.zeros_like(trial)
            optimizer = self._kind([{"params": [trial], **self._options(group)}], **self._defaults)
            optimizer.step()
            for name, value in optimizer.state[trial].items():
                if isinstance(value, Tensor):
                    found.setdefault(name, {})[group] = value
        return found
