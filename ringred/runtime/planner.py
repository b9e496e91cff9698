"""Turns a collective that the user calls into a plan: algorithm, contract, program and memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ringred.collectives.registry import ROOTED, Algorithm, lookup, prove
from ringred.errors import GridError, UnknownAlgorithm, UnsupportedTensor
from ringred.runtime.calls import Call, Copies, Native, Prepared, digest
from ringred.runtime.executor import Piece, Plan, bind
from ringred.runtime.folds import Folder, ReduceOp
from ringred.runtime.select import AUTOMATIC, RANK_ORDER, choose, costs_of, segments_for, share_bounds
from ringred.runtime.tensors import Flat
from ringred.schedule.ir import Recv
from ringred.schedule.lower import lower
from ringred.schedule.order import in_step, turns
from ringred.schedule.program import Program
from ringred.topology.calibrate import Costs
from ringred.topology.detect import local_grid
from ringred.topology.model import Topology
from ringred.transports.base import Windowed

__all__ = ["Planner", "adjacent"]

_T = TypeVar("_T")

_PROGRAMS = 256  # programs and calls kept for reuse
_PLANS = 128  # programs bound to an address
_PLAN_BYTES = 1 << 20  # bytes that such a plan may allocate for itself
_PROVED_RANKS = 32  # with more ranks, proving that puts are safe takes longer than puts save
_GIB = 1 << 30
_WHOLE = frozenset({"all_reduce", "broadcast"})
_PUTS = frozenset({"all_reduce", "broadcast", "reduce"})  # the others use several tensors, which are not exposed
_ONE_TENSOR = frozenset({"all_reduce", "broadcast", "reduce", "barrier"})


def adjacent(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The bounds of consecutive units with these lengths."""
    bounds, lo = [], 0
    for length in lengths:
        bounds.append((lo, lo + length))
        lo += length
    return bounds


class Planner:
    """Makes the calls and plans of one rank of one communicator, and caches those that can be reused."""

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        hosts: Sequence[int],
        models: Mapping[str, Topology],
        segment_bytes: int,
        windows: Windowed | None = None,
        buffers: bool = False,
        depth: int = 1,
        can_native: Callable[[torch.dtype], bool] | None = None,
        device: torch.device | None = None,
        over: Callable[[int, int, torch.dtype], Tensor] | None = None,
    ) -> None:
        self.name, self.rank, self.size = name, rank, size
        self.device = device or torch.device("cpu")
        """Where the tensors are."""
        self.on_device = self.device.type != "cpu"
        self.over = over
        """Makes a tensor over memory there that it does not keep; None if there is no way."""
        self._windows, self._buffers, self._depth = windows, buffers, depth
        self.hosts, self.models, self.segment_bytes = tuple(hosts), models, segment_bytes
        self._calls: OrderedDict[tuple[Any, ...], Call] = OrderedDict()
        self._programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        self._steady: OrderedDict[tuple[Any, ...], tuple[bool, frozenset[tuple[int, int, int]]]] = OrderedDict()
        self._own_only: OrderedDict[tuple[Any, ...], bool] = OrderedDict()
        self.can_native = can_native
        """Whether the transport's own all-reduce takes a dtype, where it has one."""
        self.native: Costs | None = None
        """The measured costs of that, where "auto" may choose it."""
        self.ready: OrderedDict[tuple[Any, ...], Prepared] = OrderedDict()
        """Calls that were made before, by all that distinguishes them (`tensors.identity`)."""

    def where(self, collective: str) -> str:
        """How messages about a call begin."""
        return f"rank {self.rank}: {collective}"

    # ------------------------------------------------------------------ calls

    def call(
        self,
        collective: str,
        like: Flat,
        count: int | None,
        op: ReduceOp | None,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        root: int = 0,
        bounds: Sequence[tuple[int, int]] | None = None,
    ) -> Call:
        """Chooses algorithm and grid for `count` elements (None if ranks may differ in it) of the dtype of `like`.

        `bounds` are the bounds of the ranks' shares, if all ranks know them. Raises `UnknownAlgorithm`, `GridError`.
        """
        shape = tuple(grid) if grid is not None else None
        lengths = None if bounds is None else tuple(hi for _, hi in bounds)
        memory = self.memory_of(like.memory) if collective in _WHOLE else "tensor"
        key = (collective, like.dtype, count, op, algorithm, shape, root, lengths, memory)
        known = self._calls.get(key)
        if known is not None:
            self._calls.move_to_end(key)
            return known
        nbytes = (count or 0) * like.dtype.itemsize
        try:
            entry, shape = self._settle(collective, algorithm, shape, nbytes, root, like.dtype, memory)
            group = entry.group(self.size, root, shape, segments_for(nbytes, self.segment_bytes))
        except (UnknownAlgorithm, GridError) as refusal:
            raise type(refusal)(f"rank {self.rank}: {collective}: {refusal}") from None
        parts = [] if op is None else [op.value]
        parts.append(str(like.dtype).removeprefix("torch."))
        if count is not None:
            parts.append(f"{count} element{'' if count == 1 else 's'}")
        if collective in ROOTED:
            parts.append(f"root {root}")
        if memory == "window":
            parts.append("in a window")
        parts.append(entry.name if group.grid is None else f"{entry.name} {'x'.join(map(str, group.grid))}")
        text = f"{collective} ({', '.join(parts)})"
        # Ranks may use different kinds of memory; only the algorithm that "auto" chose for it must be the same.
        alike = text.replace("in a window, ", "")
        stands_for = digest(f"{self.name} {alike} {group} {lengths} {self.segment_bytes}")
        return _keep(self._calls, key, Call(collective, text, entry, group, stands_for))

    def _settle(
        self,
        collective: str,
        algorithm: str,
        shape: tuple[int, ...] | None,
        nbytes: int,
        root: int,
        dtype: torch.dtype,
        memory: str,
    ) -> tuple[Algorithm, tuple[int, ...] | None]:
        if algorithm not in AUTOMATIC:
            entry = lookup(collective, algorithm)
            if shape is None and entry.grids is not None:
                shape = local_grid(self.hosts)
            return entry, shape
        rank_order = algorithm == RANK_ORDER
        if shape is not None:
            if rank_order:
                raise GridError(
                    f"{RANK_ORDER!r} takes no grid, got {shape}: a torus adds row by row, not in rank order"
                )
            return lookup(collective, "torus"), shape
        native = self.native if self.can_native is not None and self.can_native(dtype) else None
        entry, best = choose(collective, nbytes, self.model(memory, nbytes), root, native, rank_order)
        return entry, best.grid

    def model(self, memory: str, nbytes: int) -> Topology:
        """The costs of a collective on `nbytes` bytes in `memory`."""
        return self.models[costs_of(memory, nbytes)]

    def memory_of(self, tensor: Tensor) -> str:
        """The kind of memory that `tensor` lies in, which "auto" takes into account: "window" or "tensor"."""
        return "window" if self._windows is not None and self._windows.holds(tensor) else "tensor"

    def pair_call(self, like: Flat, src: int, dst: int) -> Call:
        """The call of a send from `src` to `dst`, as both of them see it."""
        entry = lookup("send_recv", "direct")
        dtype = str(like.dtype).removeprefix("torch.")
        count = like.memory.numel()
        text = f"send {src}→{dst} ({dtype}, {count} element{'' if count == 1 else 's'})"
        group = entry.group(2, root=int(src > dst))
        return Call("send_recv", text, entry, group, digest(f"{self.name} {text} {self.segment_bytes}"))

    def forget(self) -> None:
        """Discards all cached calls, so that their algorithms are chosen again."""
        self._calls.clear()
        self.ready.clear()

    # ------------------------------------------------------------------ plans

    def whole(self, call: Call, tensor: Tensor, op: ReduceOp | None, **around: Any) -> Prepared:
        """The plan of a collective on one flat tensor that every rank has. `around` are fields of `Prepared`."""
        if call.algorithm.native:
            assert op is not None, "only an all-reduce may be the transport's own"
            self._check_native(call, tensor)
            return Prepared(call, Native(tensor, op), **around)
        return self._in_one_tensor(
            call, tensor, share_bounds(tensor.numel(), call.algorithm.units(call.group)), op, around
        )

    def reduced_shares(
        self, call: Call, tensor: Tensor, bounds: Sequence[tuple[int, int]], op: ReduceOp, **around: Any
    ) -> Prepared:
        """The plan of a reduce-scatter in `tensor`, in which the share of rank r is `bounds[r]`."""
        units = [bounds[owner] for owner in call.algorithm.home(call.group)]
        return self._in_one_tensor(call, tensor, units, op, around)

    def _in_one_tensor(
        self,
        call: Call,
        tensor: Tensor,
        units: Sequence[tuple[int, int]],
        op: ReduceOp | None,
        around: dict[str, Any],
    ) -> Prepared:
        folder = None if op is None else Folder(op, tensor.dtype, self.size)
        program = self._program(call, units, tensor)
        slots = None
        if self._windows is not None:  # in a window a plan's own memory is there as well
            slots = self._windows.empty(program.slot_elements, tensor.dtype)
        exposed = None if self._windows is None else tensor
        plan = bind(program, [Piece(0, tensor)], folder, slots, exposed=exposed)
        plan.own_bytes += sum(work.nbytes for work, _ in around.get("fill", ()))
        scaled = tensor if folder is not None and folder.scales_first and self.size > 1 else None
        return Prepared(call, plan, scaled=scaled, **around)

    def remember(self, key: tuple[Any, ...], prepared: Prepared) -> Prepared:
        """Makes `prepared` `ready` under `key`, with its copies in the plan, unless it holds much memory of its own."""
        plan = prepared.plan
        if isinstance(plan, Plan):
            if plan.own_bytes > _PLAN_BYTES:
                return prepared
            if prepared.scaled is None:
                plan.surround(prepared.fill, prepared.back)
                prepared = prepared._replace(fill=(), back=())
        return _keep(self.ready, key, prepared, _PLANS)

    def leaves_others(self, call: Call, op: ReduceOp, dtype: torch.dtype) -> bool:
        """Whether a reduce-scatter writes only to this rank's own share, so that the others need no copy."""
        key = (call.algorithm.name, call.group)
        if key not in self._own_only:
            _keep(self._own_only, key, self._writes_its_own(call))
        return self._own_only[key] and not Folder(op, dtype, self.size).scales_first

    def _writes_its_own(self, call: Call) -> bool:
        home = call.algorithm.home(call.group)
        steps = call.algorithm.steps(call.group)(self.rank)
        written = {unit for step in steps for each in step if isinstance(each, Recv) for unit in each.chunk.units}
        return all(home[unit] == self.rank for unit in written)

    def in_pieces(
        self, call: Call, shares: Sequence[Tensor], op: ReduceOp | None, fill: Copies, back: Copies
    ) -> Prepared:
        """The plan of an all-gather into `shares`, one a rank, whose lengths all ranks know; or of a reduce-scatter
        which `leaves_others`, and whose result goes to the own share."""
        bounds = adjacent([share.numel() for share in shares])
        units = [bounds[owner] for owner in call.algorithm.home(call.group)]
        pieces = [Piece(lo, share) for (lo, _), share in zip(bounds, shares, strict=True)]
        folder = None if op is None else Folder(op, shares[0].dtype, self.size)
        return Prepared(call, bind(self._program(call, units, shares[0]), pieces, folder), fill, back)

    def by_units(self, call: Call, units: Sequence[Tensor], **around: Any) -> Prepared:
        """The plan of a collective whose unit `u` is the tensor `units[u]`, of which ranks may know few.

        Each unit is one message: their lengths are no part of the contract, so only whole ones can be compared.
        """
        bounds = adjacent([unit.numel() for unit in units])
        held = [Piece(lo, unit) for (lo, hi), unit in zip(bounds, units, strict=True) if hi > lo]
        program = self._program(call, bounds, units[0], whole_messages=True)
        return Prepared(call, bind(program, held or [Piece(0, units[0])], None), **around)

    def pair(self, call: Call, tensor: Tensor, src: int, dst: int, back: Copies) -> Prepared:
        """The plan of a send, or of its receive."""
        # The schedule is written for ranks 0 and 1; `place` gives them their real numbers.
        place = (min(src, dst), max(src, dst))
        steps = call.algorithm.steps(call.group)(place.index(self.rank))
        renamed = [tuple(op._replace(peer=place[op.peer]) for op in step) for step in steps]
        program = lower(self.rank, renamed, [(0, tensor.numel())], self.segment_elements(tensor))
        return Prepared(call, bind(program, [Piece(0, tensor)], None), back=back, pair=(src, dst))

    def _check_native(self, call: Call, tensor: Tensor) -> None:
        where = self.where(call.text)
        if self.can_native is None:
            raise UnknownAlgorithm(f"{where}: this transport has no all-reduce of its own; MPI has")
        if not self.can_native(tensor.dtype):
            raise UnsupportedTensor(f"{where}: MPI does not reduce {tensor.dtype} by itself")

    def empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A 1-D tensor, uninitialised, in this rank's window where it has one."""
        if self._windows is None:
            return torch.empty(elements, dtype=dtype, device=self.device)
        return self._windows.empty(elements, dtype)

    def segment_elements(self, tensor: Tensor) -> int:
        """The greatest number of elements in one message of the dtype of `tensor`."""
        return max(1, self.segment_bytes // tensor.element_size())

    def _program(
        self, call: Call, bounds: Sequence[tuple[int, int]], like: Tensor, whole_messages: bool = False
    ) -> Program:
        segment = _GIB // like.element_size() if whole_messages else self.segment_elements(like)
        key = (call.collective, call.algorithm.name, call.group, tuple(bounds), segment)
        known = self._programs.get(key)
        if known is not None:
            self._programs.move_to_end(key)
            return known
        steps = call.algorithm.steps(call.group)
        # Adjacent units of one tensor are sent in one message; shares are separate tensors.
        merge = call.collective in _ONE_TENSOR
        puts: frozenset[tuple[int, int, int]] = frozenset()
        if self._windows is not None and call.collective in _PUTS and call.group.size <= _PROVED_RANKS:
            puts = prove(call.algorithm, call.group, puts=True).put_safe
        steady, turning = (False, frozenset()) if whole_messages else self._in_step(call)
        program = lower(
            self.rank,
            steps(self.rank),
            bounds,
            segment,
            keep=self._keeps(call),
            merge=merge,
            in_parts=steady,
            put_safe=lambda step, op: (self.rank, step, op) in puts,
            buffers=self._buffers,
            depth=self._depth,
            turns=turning,
        )
        return _keep(self._programs, key, program)

    def _in_step(self, call: Call) -> tuple[bool, frozenset[tuple[int, int, int]]]:
        """Whether the schedule is `in_step`, and then its `turns`, if all messages go between hosts. Where some ranks
        share a host, their parts had better not wait for a step of the others to end."""
        key = (call.collective, call.algorithm.name, call.group)
        known = self._steady.get(key)
        if known is None:
            size, steps = call.group.size, call.algorithm.steps(call.group)
            steady = size <= _PROVED_RANKS and in_step(steps, size)
            mixed = 1 < len(set(self.hosts)) < self.size
            known = steady, turns(steps, size) if steady and self._depth > 1 and not mixed else frozenset()
            _keep(self._steady, key, known)
        return known

    def _keeps(self, call: Call) -> Callable[[int], bool]:
        """Which units of a reduction this rank must hold at the end."""
        if call.collective == "reduce_scatter":
            home = call.algorithm.home(call.group)
            return lambda unit: home[unit] == self.rank
        if call.collective == "reduce":
            return lambda unit: call.group.root == self.rank
        return lambda unit: True


def _keep(cache: OrderedDict[tuple[Any, ...], _T], key: tuple[Any, ...], value: _T, most: int = _PROGRAMS) -> _T:
    cache[key] = value
    if len(cache) > most:
        cache.popitem(last=False)
    return value
