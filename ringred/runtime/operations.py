"""The collectives and messages of a communicator, as users call them; each is prepared, and handed to the runner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, overload

import torch
from torch import Tensor

from ringred.errors import RingredError, UnsupportedTensor
from ringred.runtime import rooted, symmetric, tensors
from ringred.runtime.calls import Prepared
from ringred.runtime.folds import ReduceOp
from ringred.runtime.persistent import PersistentAllReduce
from ringred.runtime.planner import Planner
from ringred.runtime.runner import Runner
from ringred.runtime.work import Work

__all__ = ["Operations"]

_P = ParamSpec("_P")


def _remembered(
    planner: Planner, key: tuple[Any, ...], prepare: Callable[..., Prepared], arguments: Sequence[Any]
) -> Prepared:
    """What `prepare` makes of `arguments`, ready for the next time; it does not hold the memory of their tensors."""
    assert planner.over is not None, "else nothing is remembered"
    return planner.remember(key, prepare(planner, *tensors.borrowed(arguments, planner.over)))


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for one in arguments:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _tensors(one)


class Operations:
    """What `Communicator` can do with tensors.

    Tensors are dense, of any dtype where they are only moved, of the dtypes in `ringred.runtime.folds.SUPPORTED` where
    they are reduced. They are on the CPU, or, where the ranks are on one host with NVIDIA's GPUs, on this rank's device
    (experimental): collectives on the device's tensors are in an order of their own. Every collective takes
    `async_op=True`, and then returns a `Work`; its tensors must not be touched until that is done.
    """

    _planner: Planner
    _runner: Runner

    def _on(self, device: torch.device) -> Operations:
        """The same for tensors of another device. The first call for it is collective."""
        raise NotImplementedError

    def _for(self, arguments: Sequence[Any]) -> Operations:
        """What takes these arguments: this, or `_on` the device on which all of their tensors are."""
        found = {tensor.device for tensor in _tensors(arguments)}
        own = self._planner.device
        if not found or found == {own}:
            return self
        if len(found) > 1 or own.type != "cpu":
            got = ", ".join(sorted(map(str, found)))
            where = own if own.type != "cpu" else "one device"
            raise UnsupportedTensor(f"rank {self._planner.rank}: expected tensors on {where}, got them on {got}")
        return self._on(next(iter(found)))

    def abort(self, cause: BaseException) -> None:
        """Tells every rank that this one failed with `cause` and takes no further part; they all raise."""
        self._runner.abort(cause)

    @overload
    def all_reduce(
        self,
        tensor: Tensor,
        op: object = ...,
        *,
        algorithm: str = ...,
        grid: Sequence[int] | None = ...,
        async_op: Literal[False] = ...,
    ) -> None: ...
    @overload
    def all_reduce(
        self,
        tensor: Tensor,
        op: object = ...,
        *,
        algorithm: str = ...,
        grid: Sequence[int] | None = ...,
        async_op: Literal[True],
    ) -> Work[None]: ...
    @overload
    def all_reduce(
        self,
        tensor: Tensor,
        op: object = ...,
        *,
        algorithm: str = ...,
        grid: Sequence[int] | None = ...,
        async_op: bool,
    ) -> Work[None] | None: ...
    def all_reduce(
        self,
        tensor: Tensor,
        op: object = ReduceOp.SUM,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Combines `tensor` over all ranks, in place: afterwards every rank holds the same bits.

        `algorithm` is one of `ringred.algorithms("all_reduce")`, "auto" or "rank_order". "rank_order" takes the fastest
        algorithm that adds every element in rank order, so that a sum has the same bits over any transport and however
        the data is divided.
        """
        return self._launch(async_op, symmetric.all_reduce, tensor, op, algorithm, grid)

    def all_reduce_init(
        self,
        tensor: Tensor,
        op: object = ReduceOp.SUM,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
    ) -> PersistentAllReduce:
        """Prepares an all-reduce of one contiguous `tensor` that can be started many times; plans it once, now.

        Like the persistent collectives of MPI-4. The returned object keeps the tensor's memory alive.
        """
        there = self._for((tensor,))
        prepared = there._prepare(symmetric.all_reduce_in_place, tensor, op, algorithm, grid)
        return PersistentAllReduce(there._runner, prepared, tensor)

    def all_reduce_for(self, purpose: str, tensor: Tensor, op: object) -> None:
        """The all-reduce of a tensor for a `purpose`, as `for_purpose` has it; recalled if it was called before, also
        behind asynchronous calls that have ended."""
        self._runner.rearm()
        self._launch(False, symmetric.all_reduce_for, purpose, tensor, op)

    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor | Sequence[Tensor],
        op: object = ReduceOp.SUM,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Combines `input` over all ranks; rank r gets share r of the result in `output`. `input` is not changed.

        `input` is one tensor of equal shares in rank order, or a list with one tensor for each rank; their lengths may
        differ.
        """
        return self._launch(async_op, symmetric.reduce_scatter, output, input, op, algorithm, grid)

    def all_gather(
        self,
        output: Tensor | Sequence[Tensor],
        tensor: Tensor,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Gathers `tensor` of every rank into `output` on all ranks.

        `output` is one tensor of equal shares in rank order, or a list with one tensor for each rank; their lengths may
        differ.
        """
        return self._launch(async_op, symmetric.all_gather, output, tensor, algorithm, grid)

    def broadcast(
        self, tensor: Tensor, src: int = 0, *, algorithm: str = "auto", async_op: bool = False
    ) -> Work[None] | None:
        """Copies `tensor` of rank `src` into that of every rank.

        The root of a short one is done once it has sent it. If another rank calls something else in its place, the root
        hears of that at its next collective or at `close()`.
        """
        return self._launch(async_op, rooted.broadcast, tensor, src, algorithm)

    def reduce(
        self,
        tensor: Tensor,
        dst: int = 0,
        op: object = ReduceOp.SUM,
        *,
        algorithm: str = "auto",
        async_op: bool = False,
    ) -> Work[None] | None:
        """Combines `tensor` over all ranks into `tensor` of rank `dst`; on other ranks `tensor` is not changed."""
        return self._launch(async_op, rooted.reduce, tensor, dst, op, algorithm)

    def gather(
        self,
        tensor: Tensor,
        output: Tensor | Sequence[Tensor] | None = None,
        dst: int = 0,
        *,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Gathers `tensor` of every rank into `output` on rank `dst`.

        `output` is one tensor of equal shares, or a list with one tensor for each rank; their lengths may differ. The
        other ranks pass None as `output`.
        """
        return self._launch(async_op, rooted.gather, tensor, output, dst)

    def scatter(
        self,
        tensor: Tensor,
        input: Tensor | Sequence[Tensor] | None = None,
        src: int = 0,
        *,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Copies to `tensor` of every rank its share of `input` of rank `src`; the inverse of `gather`."""
        return self._launch(async_op, rooted.scatter, tensor, input, src)

    def all_to_all(
        self, output: Tensor | Sequence[Tensor], input: Tensor | Sequence[Tensor], *, async_op: bool = False
    ) -> Work[None] | None:
        """Copies share j of `input` on rank i to share i of `output` on rank j.

        Each is one tensor of equal shares, or a list with one tensor for each rank. The lengths may differ, but sender
        and receiver of a share must agree on its length.
        """
        return self._launch(async_op, symmetric.all_to_all, output, input)

    def barrier(self, *, async_op: bool = False) -> Work[None] | None:
        """Returns once every rank has called it."""
        return self._launch(async_op, symmetric.barrier)

    def send(self, tensor: Tensor, dst: int, *, async_op: bool = False) -> Work[None] | None:
        """Sends `tensor` to rank `dst`, which calls `recv`. Calls between two ranks are matched in their order.

        With `async_op` the tensor is copied and the call done at once, so that ranks may send to each other
        before they receive. Without, they wait for each other: one thread does everything, in order.
        """
        if async_op:
            there = self._for((tensor,))
            return there._runner.launch(there._prepare(rooted.send_later, tensor, dst), async_op)
        return self._launch(async_op, rooted.send, tensor, dst)

    def recv(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work[None] | None:
        """Receives into `tensor` the data that rank `src` sends."""
        return self._launch(async_op, rooted.recv, tensor, src)

    def empty(
        self,
        shape: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """An uninitialised tensor in memory that this rank's peers on the same host can read and write.

        Collectives on it need no copies to other memory. It is freed like any tensor. This call is not collective.
        If ranks share no memory, it returns an ordinary tensor. `dtype` defaults to torch's default. The first call for
        a `device` that is not the CPU is collective.
        """
        if device is not None and torch.device(device).type != self._planner.device.type:
            return self._on(torch.device(device)).empty(shape, dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        return self._planner.empty(math.prod(shape), dtype).view(shape)

    def _prepare(
        self, prepare: Callable[Concatenate[Planner, _P], Prepared], *arguments: _P.args, **options: _P.kwargs
    ) -> Prepared:
        try:
            if torch.is_inference_mode_enabled():  # what is kept for the next time may be written to outside of it
                with torch.inference_mode(False):
                    return prepare(self._planner, *arguments, **options)
            return prepare(self._planner, *arguments, **options)
        except (RingredError, ValueError, TypeError):
            raise  # arguments that were refused: nothing has happened
        except BaseException as failure:
            self.abort(failure)
            raise

    def _launch(self, async_op: bool, prepare: Callable[..., Prepared], *arguments: Any) -> Work[None] | None:
        """Runs what `prepare` makes of `arguments`, or what it made of the same ones before.

        What is kept for the next time does not hold the memory of tensors: it is found again by their addresses, by
        somebody who holds them.
        """
        if not async_op and self._runner.recall.play(prepare, *arguments):
            return None
        planner = self._planner
        try:
            device = planner.device if planner.on_device else None
            key = None if planner.over is None else tensors.identity(prepare, arguments, device)
            prepared = None if key is None else planner.ready.get(key)
        except TypeError:  # an argument that cannot be right, and is not even hashable
            key = prepared = None
        if prepared is None:
            if key is None:
                there = self._for(arguments)
                if there is not self:
                    return there._launch(async_op, prepare, *arguments)
                return self._runner.launch(self._prepare(prepare, *arguments), async_op)
            prepared = self._prepare(_remembered, key, prepare, arguments)
        kept = key if key is not None and planner.ready.get(key) is prepared else None
        return self._runner.launch(prepared, async_op, holding=arguments, identity=kept)
