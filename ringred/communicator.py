"""The user's object: collectives over a group of ranks, synchronous or as `Work`, by any algorithm."""

from __future__ import annotations

import atexit
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, cast, overload

import torch
from tabulate import tabulate
from torch import Tensor

from ringred.errors import TransportUnavailable, UnknownAlgorithm, UnsupportedTensor
from ringred.runtime import probe, tensors
from ringred.runtime.config import Config, mpi_environment
from ringred.runtime.folds import ReduceOp, reduce_op
from ringred.runtime.planner import Call, Planner, Prepared, adjacent
from ringred.runtime.runner import Runner
from ringred.runtime.select import candidates, choose, decided_as, machine_model
from ringred.runtime.trace import Tracer
from ringred.runtime.work import Work
from ringred.topology.calibrate import Tuning
from ringred.topology.detect import host_indices, host_name
from ringred.topology.model import Topology
from ringred.transports import routed
from ringred.transports.base import Counters, Gather, Transport, Windowed

__all__ = ["Communicator", "PersistentAllReduce", "abort_all"]

_live: weakref.WeakSet[Communicator] = weakref.WeakSet()


class Communicator:
    """`size` ranks that reach each other over `transport`, of which this is `rank`.

    Made by `ringred.init()`, `from_mpi`, `from_store` or `from_process_group`. All ranks call the same
    collectives in the same order; where they do not, every rank raises. One thread at a time drives a
    communicator; calls from several threads are put in one order, which must be the same on all ranks. After
    a failure a communicator stays unusable: each further call raises and says why.

    Tensors are dense CPU tensors of the dtypes in `ringred.runtime.folds.SUPPORTED`. Every collective takes
    `async_op=True`, and then returns a `Work`; until that is done its tensors must not be touched.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        hosts: Sequence[int] | None = None,
        config: Config | None = None,
        name: str = "world",
    ) -> None:
        self.config = config or Config.from_environment()
        self.rank, self.size, self.name = transport.rank, transport.size, name
        self.hosts = tuple(hosts) if hosts is not None else (0,) * transport.size
        self.transport = transport
        self.tuning: Tuning = {}
        segment_bytes = self.config.segment_bytes or transport.segment_bytes
        windows = cast(Windowed, transport) if transport.windows else None
        buffers = transport.buffers and segment_bytes <= transport.segment_bytes
        self._planner = Planner(name, self.rank, self.size, self.hosts, self._models(), segment_bytes, windows, buffers)
        self._runner = Runner(transport, self.config.timeout, name)
        self._splits = 0
        self._children: weakref.WeakSet[Communicator] = weakref.WeakSet()
        if self.config.trace and name == "world":
            self.start_trace(self.config.trace)
        _live.add(self)

    # ------------------------------------------------------------------ making communicators

    @classmethod
    def from_mpi(cls, comm: Any = None, *, config: Config | None = None) -> Communicator:
        """From an mpi4py communicator (`COMM_WORLD` by default), of which it takes duplicates. Collective.

        Raises `TransportUnavailable` where mpi4py or an MPI library is missing.
        """
        mpi_environment()  # MPI reads its settings when it starts, which importing it does
        try:
            from ringred.transports import mpi
        except (ImportError, RuntimeError) as failure:
            raise TransportUnavailable(
                f"MPI cannot be used: {failure}; pip install 'ringred[mpi]' brings mpi4py and an MPI"
            ) from failure
        comm = mpi.world() if comm is None else comm
        config = config or Config.from_environment()
        gather = mpi.gatherer(comm)
        names = gather(host_name())
        transport = _connect(gather, comm.Get_rank(), len(names), lambda: mpi.MpiTransport(comm), config, "mpi")
        return probe.tuned(cls(transport, hosts=host_indices(names), config=config), gather)

    @classmethod
    def from_store(cls, store: Any, rank: int, size: int, *, config: Config | None = None) -> Communicator:
        """From a torch store (`torch.distributed.Store`) that all `size` ranks share. Collective.

        Gloo connects the ranks. Raises `TransportUnavailable` if not all of them come before the timeout.
        """
        from ringred.transports import torch_p2p

        config = config or Config.from_environment()
        store = torch_p2p.corner(store, rank)
        gather = torch_p2p.gatherer(store, rank, size, config.timeout)
        names = gather(host_name())
        address = torch_p2p.bind_address(names, config.interface)
        transport = _connect(
            gather,
            rank,
            size,
            lambda: torch_p2p.TorchP2PTransport(store, rank, size, config.timeout, address),
            config,
            "torch_p2p",
        )
        comm = probe.tuned(cls(transport, hosts=host_indices(names), config=config), gather)
        torch_p2p.leave(store, rank, size, config.timeout)
        return comm

    @classmethod
    def from_process_group(cls, group: Any = None, *, config: Config | None = None) -> Communicator:
        """With the ranks of a torch process group (the default one if None), through its store. Collective."""
        from ringred.transports import torch_p2p

        store, rank, size = torch_p2p.group_store(group)
        return cls.from_store(store, rank, size, config=config)

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """The ranks that give the same `color` form a communicator, ordered by (`key`, rank). Collective.

        Returns None to those that give None. As `MPI_Comm_split`.
        """
        mine = torch.tensor([-1 if color is None else color, key], dtype=torch.int64)
        if color is not None and color < 0:
            raise ValueError(f"split: expected a color ≥ 0 or None, got {color}")
        table = torch.empty(2 * self.size, dtype=torch.int64)
        self.all_gather(table, mine)
        self._splits += 1
        if color is None:
            return None
        rows = table.view(self.size, 2).tolist()
        members = [rank for _, rank in sorted((rows[r][1], r) for r in range(self.size) if rows[r][0] == color)]
        return self.subset(members, f"{self.name}/{self._splits}.{color}")

    def subset(self, members: Sequence[int], name: str, *, timeout: float | None = None) -> Communicator:
        """A communicator of `members`, ranks of this one, in that order; only they call it. `name` is one that they
        have given to no other. Its collectives may take `timeout` seconds, or as long as here."""
        config = self.config if timeout is None else replace(self.config, timeout=timeout)
        transport = self.transport.subset(members, name)
        child = Communicator(transport, hosts=[self.hosts[rank] for rank in members], config=config, name=name)
        child.tune(self.tuning)
        self._children.add(child)
        return child

    def duplicate(self) -> Communicator:
        """A communicator of the same ranks, whose collectives stand in no order with those of this one. Collective,
        as `MPI_Comm_dup`. It has counters of its own."""
        self._splits += 1
        return self.subset(range(self.size), f"{self.name}/{self._splits}")

    def set_timeout(self, seconds: float) -> None:
        """From here on a collective fails after `seconds`."""
        self.config = replace(self.config, timeout=seconds)
        self._runner.timeout = seconds

    # ------------------------------------------------------------------ collectives

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

        `algorithm` is a name of `ringred.algorithms("all_reduce")`, "auto", or "rank_order": the fastest of those that
        add every element in rank order, so that a sum has the same bits on any transport and however it is cut.
        """
        plain = not async_op and grid is None and tensors.is_plain(tensor)
        if plain:
            try:
                known = self._planner.ready.get((tensor.data_ptr(), tensor.numel(), tensor.dtype, op, algorithm))
            except TypeError:  # no operation at all
                known = None
            if known is not None:
                return self._runner.launch(*known, holding=tensor)
        kind = reduce_op(op, self._where("all_reduce"))
        flat, back = tensors.flat(self._where("all_reduce"), tensor, kind)
        call = self._planner.call("all_reduce", flat, flat.numel(), kind, algorithm=algorithm, grid=grid)
        key = (flat.data_ptr(), flat.numel(), flat.dtype, op, algorithm)
        if call.algorithm.native:
            self._check_native(call, flat)
            if plain:
                self._planner.remember(key, call, self._native_again(tensors.unowned(flat), kind))
            return self._runner.launch(call, lambda: self._native(flat, kind, back), async_op)
        if plain:
            return self._runner.launch(call, lambda: self._planner.whole_again(key, call, flat, kind))
        return self._runner.launch(call, lambda: self._planner.whole(call, flat, kind, back), async_op)

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor in memory that this rank's peers on the same host can read and write.

        Collectives on it need no copies to other memory. It is freed as any tensor is; no other rank need do
        the same. Where ranks share no memory it is an ordinary tensor. `dtype` defaults to torch's default.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if not self.transport.windows:
            return torch.empty(shape, dtype=dtype)
        return cast(Windowed, self.transport).empty(math.prod(shape), dtype).view(shape)

    def all_reduce_init(
        self,
        tensor: Tensor,
        op: object = ReduceOp.SUM,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
    ) -> PersistentAllReduce:
        """An all-reduce of one contiguous `tensor` to be started many times: its plan is made now, once.

        As MPI-4's persistent collectives. It holds the tensor's memory.
        """
        kind = reduce_op(op, self._where("all_reduce"))
        flat, back = tensors.flat(self._where("all_reduce"), tensor, kind)
        if back is not None:
            raise UnsupportedTensor("all_reduce_init: expected a contiguous tensor, whose memory stays in place")
        call = self._planner.call("all_reduce", flat, flat.numel(), kind, algorithm=algorithm, grid=grid)
        if call.algorithm.native:
            self._check_native(call, flat)
            return PersistentAllReduce(self, call, lambda: self._native(flat, kind, None))
        prepared = self._planner.whole(call, flat, kind, None)
        return PersistentAllReduce(self, call, lambda: prepared)

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
        """Combines over all ranks and leaves share r on rank r, in `output`; `input` is not changed.

        `input` is one tensor of equal shares in rank order, or a list of one tensor a rank, whose lengths may
        differ.
        """
        kind = reduce_op(op, self._where("reduce_scatter"))
        shares = tensors.shares(self._where("reduce_scatter"), input, self.size, kind)
        flat, back = tensors.flat(self._where("reduce_scatter"), output, kind, fill=False)
        bounds = adjacent([share.numel() for share in shares])
        lo, hi = bounds[self.rank]
        tensors.expect(self._where("reduce_scatter"), "output", flat, hi - lo, shares[0].dtype)
        call = self._planner.call(
            "reduce_scatter", flat, bounds[-1][1], kind, algorithm=algorithm, grid=grid, bounds=bounds
        )

        def plan() -> Prepared:
            apart = tensors.is_apart(flat, shares, self.rank)
            if apart and self._planner.leaves_others(call, kind, flat.dtype):
                pieces = [*shares[: self.rank], flat, *shares[self.rank + 1 :]]
                return self._planner.reduced_pieces(call, pieces, kind, lambda: _copy(flat, shares[self.rank]), back)
            work = torch.cat(shares) if len(shares) > 1 else shares[0].clone()
            after = tensors.in_turn(lambda: _copy(flat, work[lo:hi]), back)
            return self._planner.reduced_shares(call, work, bounds, kind, after)

        return self._runner.launch(call, plan, async_op)

    def all_gather(
        self,
        output: Tensor | Sequence[Tensor],
        tensor: Tensor,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Gathers `tensor` of every rank into `output` on all: one tensor of equal shares in rank order, or a
        list of one tensor a rank, whose lengths may differ."""
        shares, back = tensors.outputs(self._where("all_gather"), output, self.size)
        flat, _ = tensors.flat(self._where("all_gather"), tensor, None, written=False)
        tensors.expect(
            self._where("all_gather"), f"share {self.rank} of output", shares[self.rank], flat.numel(), flat.dtype
        )
        bounds = adjacent([share.numel() for share in shares])
        call = self._planner.call(
            "all_gather", flat, bounds[-1][1], None, algorithm=algorithm, grid=grid, bounds=bounds
        )

        def plan() -> Prepared:
            return self._planner.gathered_shares(call, shares, lambda: _copy(shares[self.rank], flat), back)

        return self._runner.launch(call, plan, async_op)

    def broadcast(
        self, tensor: Tensor, src: int = 0, *, algorithm: str = "auto", async_op: bool = False
    ) -> Work[None] | None:
        """Copies `tensor` of rank `src` into that of every rank."""
        self._check_peer("broadcast", "src", src)
        flat, back = tensors.flat(self._where("broadcast"), tensor, None, written=self.rank != src)
        call = self._planner.call("broadcast", flat, flat.numel(), None, algorithm=algorithm, root=src)
        after = back if self.rank != src else None
        return self._runner.launch(call, lambda: self._planner.whole(call, flat, None, after), async_op)

    def reduce(
        self,
        tensor: Tensor,
        dst: int = 0,
        op: object = ReduceOp.SUM,
        *,
        algorithm: str = "auto",
        async_op: bool = False,
    ) -> Work[None] | None:
        """Combines `tensor` over all ranks into that of rank `dst`; the others keep theirs."""
        self._check_peer("reduce", "dst", dst)
        kind = reduce_op(op, self._where("reduce"))
        flat, back = tensors.flat(self._where("reduce"), tensor, kind, written=self.rank == dst)
        call = self._planner.call("reduce", flat, flat.numel(), kind, algorithm=algorithm, root=dst)

        def plan() -> Prepared:
            mine = flat if self.rank == dst else flat.clone()
            return self._planner.whole(call, mine, kind, back if self.rank == dst else None)

        return self._runner.launch(call, plan, async_op)

    def gather(
        self,
        tensor: Tensor,
        output: Tensor | Sequence[Tensor] | None = None,
        dst: int = 0,
        *,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Gathers `tensor` of every rank into `output` on rank `dst`: one tensor of equal shares, or a list of
        one tensor a rank, whose lengths may differ. The other ranks give no `output`."""
        self._check_peer("gather", "dst", dst)
        flat, _ = tensors.flat(self._where("gather"), tensor, None, written=False)
        if self.rank != dst:
            self._expect_none("gather", "output", output, dst)
            shares, back = [flat.new_empty(0)] * self.size, None
        else:
            if output is None:
                raise ValueError(f"gather: rank {self.rank} is dst and expected an output, got None")
            shares, back = tensors.outputs(self._where("gather"), output, self.size)
            tensors.expect(self._where("gather"), f"share {self.rank} of output", shares[dst], flat.numel(), flat.dtype)
        call = self._planner.call("gather", flat, None, None, root=dst)

        def plan() -> Prepared:
            mine = shares if self.rank == dst else [*shares[: self.rank], flat, *shares[self.rank + 1 :]]
            before = (lambda: _copy(shares[dst], flat)) if self.rank == dst else None
            return self._planner.pieces(call, mine, before, back)

        return self._runner.launch(call, plan, async_op)

    def scatter(
        self,
        tensor: Tensor,
        input: Tensor | Sequence[Tensor] | None = None,
        src: int = 0,
        *,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Gives every rank its share of `input` of rank `src`, into `tensor`; the counterpart of `gather`."""
        self._check_peer("scatter", "src", src)
        flat, back = tensors.flat(self._where("scatter"), tensor, None, fill=False)
        if self.rank != src:
            self._expect_none("scatter", "input", input, src)
            shares = [flat.new_empty(0)] * self.size
        else:
            if input is None:
                raise ValueError(f"scatter: rank {self.rank} is src and expected an input, got None")
            shares = tensors.shares(self._where("scatter"), input, self.size, None)
            tensors.expect(self._where("scatter"), f"share {self.rank} of input", shares[src], flat.numel(), flat.dtype)
        call = self._planner.call("scatter", flat, None, None, root=src)

        def plan() -> Prepared:
            mine = shares if self.rank == src else [*shares[: self.rank], flat, *shares[self.rank + 1 :]]
            before = (lambda: _copy(flat, shares[src])) if self.rank == src else None
            return self._planner.pieces(call, mine, before, back)

        return self._runner.launch(call, plan, async_op)

    def all_to_all(
        self, output: Tensor | Sequence[Tensor], input: Tensor | Sequence[Tensor], *, async_op: bool = False
    ) -> Work[None] | None:
        """Share j of `input` on rank i becomes share i of `output` on rank j. One tensor of equal shares, or a
        list of one tensor a rank, whose lengths may differ as long as both ends agree."""
        outgoing = tensors.shares(self._where("all_to_all"), input, self.size, None)
        incoming, back = tensors.outputs(self._where("all_to_all"), output, self.size)
        own = self.rank
        tensors.expect(
            self._where("all_to_all"),
            f"share {own} of output",
            incoming[own],
            outgoing[own].numel(),
            outgoing[own].dtype,
        )
        call = self._planner.call("all_to_all", incoming[own], None, None)

        def plan() -> Prepared:
            units = [incoming[own].new_empty(0)] * self.size**2
            for peer in range(self.size):
                units[peer * self.size + own] = incoming[peer]
                units[own * self.size + peer] = outgoing[peer]
            return self._planner.pieces(call, units, lambda: _copy(incoming[own], outgoing[own]), back)

        return self._runner.launch(call, plan, async_op)

    def barrier(self, *, async_op: bool = False) -> Work[None] | None:
        """Returns once every rank has called it."""
        token = torch.zeros(1, dtype=torch.uint8)
        call = self._planner.call("barrier", token, 1, ReduceOp.MAX)
        return self._runner.launch(call, lambda: self._planner.whole(call, token, ReduceOp.MAX, None), async_op)

    def send(self, tensor: Tensor, dst: int, *, async_op: bool = False) -> Work[None] | None:
        """Sends `tensor` to rank `dst`, which calls `recv`. Calls between two ranks are matched in their order.

        With `async_op` the tensor is copied and the call done at once, so that ranks may send to each other
        before they receive. The other way round they wait for each other: one thread does all, in order.
        """
        where = self._where("send")
        self._check_peer("send", "dst", dst, itself=False)
        flat, _ = tensors.flat(where, tensor, None, written=False)
        call, pair = self._planner.pair_call(flat, self.rank, dst), (self.rank, dst)
        if async_op:
            # In a window a message needs no slot, so that the receiver gets it whatever this rank does meanwhile.
            copied = self.empty(flat.numel(), flat.dtype).copy_(flat)
            parts = copied.split(self._planner.segment_elements(flat))
            return self._runner.launch(call, lambda: self._runner.post(dst, parts), async_op, pair)
        return self._runner.launch(call, lambda: self._planner.pair(call, flat, *pair, None), async_op, pair)

    def recv(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work[None] | None:
        """Receives into `tensor` what rank `src` sends."""
        where = self._where("recv")
        self._check_peer("recv", "src", src, itself=False)
        flat, back = tensors.flat(where, tensor, None, fill=False)
        call, pair = self._planner.pair_call(flat, src, self.rank), (src, self.rank)
        return self._runner.launch(call, lambda: self._planner.pair(call, flat, *pair, back), async_op, pair)

    # ------------------------------------------------------------------ what it says of itself

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this rank's host, itself among them."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    @property
    def counters(self) -> Counters:
        """Messages and bytes that this rank has sent and received so far."""
        return self.transport.counters

    def tune(self, tuning: Tuning) -> None:
        """From here on "auto" decides by `tuning`, which must be the same on every rank; {}: by built-in costs."""
        self.tuning = dict(tuning)
        self._planner.models = self._models()
        can: Callable[[torch.dtype], bool] | None = getattr(self.transport, "can_all_reduce", None)
        known = self.tuning.get("native")
        self._planner.native = (known, can) if known is not None and can is not None else None
        self._planner.forget()

    def choice(self, nbytes: int, collective: str = "all_reduce", memory: str = "tensor") -> str:
        """The algorithm that "auto" takes for `nbytes` bytes in such `memory`."""
        known = self.tuning.get("native") if collective == "all_reduce" else None
        return choose(collective, nbytes, self._planner.models[memory], native=known)[0].name

    def predicted_seconds(self, nbytes: int) -> float:
        """What the cost model says of an all-reduce of `nbytes` bytes in memory of `empty`, by the algorithm that
        "auto" takes."""
        known = self.tuning.get("native")
        return choose("all_reduce", nbytes, self._planner.models["window"], native=known)[1].seconds

    def memory_of(self, tensor: Tensor) -> str:
        """The kind of memory that `tensor` lies in: "window" if it came from `empty` and peers share it."""
        return self._planner.memory_of(tensor)

    def _models(self) -> dict[str, Topology]:
        return {
            memory: machine_model(self.transport.name, self.hosts, self.tuning, memory)
            for memory in ("tensor", "window")
        }

    def explain(
        self, nbytes: int, collective: str = "all_reduce", *, memory: str = "tensor", measured: bool = False
    ) -> str:
        """The algorithms for `nbytes` bytes with their predicted times; the first is what "auto" takes.

        `memory` is "tensor" for ordinary tensors, "window" for those of `empty`. With `measured`, which is
        collective and for all-reduce only, each is timed as well, on float32.
        """
        decided = decided_as(nbytes)
        known = self.tuning.get("native") if collective == "all_reduce" else None
        found = candidates(collective, self.size, decided, self._planner.models[memory], native=known)
        columns = ["algorithm", "grid", "predicted µs"]
        rows = [[c.name, "x".join(map(str, c.grid)) if c.grid else "", f"{c.seconds * 1e6:.1f}"] for c in found]
        if measured:
            columns.append("measured µs")
            elements = max(1, nbytes // 4)
            tensor = self.empty(elements, torch.float32) if memory == "window" else torch.empty(elements)
            for row, candidate in zip(rows, found, strict=True):
                row.append(f"{probe.seconds_of(self, tensor, candidate.name, 5) * 1e6:.1f}")
        head = f"{collective} of {nbytes} bytes (decided as {decided}) on {self.size} ranks, {self.transport.name}"
        costs = "measured on this machine" if self.tuning else "built-in costs"
        return f"{head}, {costs}\n{tabulate(rows, headers=columns, disable_numparse=True)}"

    @property
    def tracer(self) -> Tracer | None:
        """What keeps events, while a trace is made."""
        return self._runner.tracer

    def start_trace(self, path: str) -> Tracer:
        """From here on events are kept; `close()` writes them as a Chrome trace to `path` (the rank goes in)."""
        tracer = self._runner.tracer = Tracer(self.rank, self.size, path)
        return tracer

    @contextmanager
    def for_purpose(self, purpose: str) -> Iterator[None]:
        """Calls that this thread makes within it only meet those for the same `purpose`: it is part of their contracts,
        and errors tell it. One thread at a time."""
        with self._runner.order:
            self._runner.purpose = purpose
            try:
                yield
            finally:
                self._runner.purpose = ""

    # ------------------------------------------------------------------ ending

    @property
    def closed(self) -> bool:
        return self._runner.closed

    def abort(self, cause: BaseException) -> None:
        """Tells every rank that this one failed with `cause` and takes no further part; they all raise."""
        self._runner.abort(cause)
        for child in list(self._children):
            child.abort(cause)

    def close(self) -> None:
        """Finishes what is in flight and gives everything back. A second call does nothing."""
        self._runner.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> None:
        if value is not None:
            self.abort(value)
        self.close()

    def __deepcopy__(self, memo: Any) -> Communicator:
        return self  # a module that communicates is copied, its communicator is not

    def __repr__(self) -> str:
        return f"<Communicator {self.name}: rank {self.rank} of {self.size} over {self.transport.name}>"

    # ------------------------------------------------------------------ helpers

    def _where(self, collective: str) -> str:
        return f"rank {self.rank}: {collective}"

    def _check_peer(self, where: str, what: str, peer: int, itself: bool = True) -> None:
        if not 0 <= peer < self.size:
            raise ValueError(f"{self._where(where)}: {what} {peer} is no rank of 0..{self.size - 1}")
        if not itself and peer == self.rank:
            raise ValueError(f"{self._where(where)}: to or from itself")

    def _expect_none(self, where: str, what: str, given: object, root: int) -> None:
        if given is not None:
            raise ValueError(f"{self._where(where)}: {what} is for rank {root} only, expected None here")

    def _check_native(self, call: Call, tensor: Tensor) -> None:
        can = getattr(self.transport, "can_all_reduce", None)
        where = f"rank {self.rank}: {call.text}"
        if can is None:
            raise UnknownAlgorithm(f"{where}: {self.transport.name} has no all-reduce of its own; MPI has")
        if not can(tensor.dtype):
            raise UnsupportedTensor(f"{where}: MPI does not reduce {tensor.dtype} by itself")

    def _native_again(self, tensor: Tensor, op: ReduceOp) -> Callable[[], None]:
        return lambda: self._native(tensor, op, None)

    def _native(self, tensor: Tensor, op: ReduceOp, back: tensors.WriteBack) -> None:
        native: Any = self.transport
        native.native_all_reduce(tensor, op.value, time.monotonic() + self.config.timeout)
        if back is not None:
            back()


class PersistentAllReduce:
    """An all-reduce whose plan is made: `start()` runs it on what its tensor then holds."""

    def __init__(self, comm: Communicator, call: Call, prepare: Callable[[], Prepared | None]) -> None:
        self._comm, self._call, self._prepare = comm, call, prepare

    @property
    def algorithm(self) -> str:
        """The name of the algorithm that it runs."""
        return self._call.algorithm.name

    def start(self, purpose: str = "") -> Work[None]:
        """Starts it, to run on the progress thread. `purpose` is as in `Communicator.for_purpose`."""
        call = self._call.for_purpose(purpose) if purpose else self._call
        work = self._comm._runner.launch(call, self._prepare, async_op=True)
        assert work is not None, "asynchronous calls return their work"
        return work


def _connect(
    gather: Gather, rank: int, size: int, far: Callable[[], Transport], config: Config, name: str
) -> Transport:
    """Shared memory within a host and `far()`, which is called `name`, between hosts; or what the settings say."""
    if config.transport == name or (size == 1 and config.transport is None):
        return far()
    only_near = config.transport == "shm"
    # MPI's own all-reduce is an algorithm like others.
    return routed.join(
        gather, rank, size, far, config.timeout, only_near=only_near, keep_far=name == "mpi" and not only_near
    )


def _copy(target: Tensor, source: Tensor) -> None:
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)


@atexit.register
def _close_all() -> None:
    for comm in list(_live):
        try:
            comm.close()
        except Exception as failure:  # the others are closed all the same
            print(f"ringred: closing {comm!r}: {failure}", file=sys.stderr, flush=True)


def abort_all(cause: BaseException) -> None:
    """Tells the peers of every communicator that this process failed with `cause`."""
    for comm in list(_live):
        comm.abort(cause)
