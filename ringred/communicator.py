"""The user's object: collectives over a group of ranks, synchronous or as `Work`, by any algorithm."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ringred.collectives.registry import Algorithm, lookup
from ringred.config import Config
from ringred.errors import (
    PeerFailed,
    RingredError,
    TransportUnavailable,
    UnknownAlgorithm,
    UnsupportedTensor,
)
from ringred.executor import Piece, Plan, bind, run
from ringred.failures import RAISED, Report, diagnose
from ringred.ops import Folder, ReduceOp, check_dtype, reduce_op
from ringred.schedule.ir import Group
from ringred.schedule.lower import Program, lower
from ringred.select import candidates, choose, machine_model, segments_for, share_bounds
from ringred.topology.detect import host_indices, host_name, local_grid
from ringred.trace import Tracer
from ringred.transports.base import Counters, Fault, Request, Transport
from ringred.work import Progress, Work

__all__ = ["Communicator", "PersistentAllReduce", "abort_all"]

_LIBRARIES = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (__file__, torch.__file__))
_PROGRAMS = 256  # programs kept for reuse
_OUTGOING = 32  # asynchronous sends that may be on their way
_REPORT_WAIT = 0.5  # seconds to wait for the reports of other ranks when a collective failed
_GIB = 1 << 30


class _Call(NamedTuple):
    """One collective as the user asked for it: what every rank must ask for alike."""

    collective: str
    text: str
    algorithm: Algorithm
    group: Group
    digest: int


class _Sides(NamedTuple):
    """What is done on either side of a plan: before it, and with its buffer after it."""

    plan: Plan
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None


_live: weakref.WeakSet[Communicator] = weakref.WeakSet()


class Communicator:
    """`size` ranks that reach each other over `transport`, of which this is `rank`.

    Made by `ringred.init()`, `from_mpi`, `from_store` or `from_process_group`. All ranks call the same
    collectives in the same order; where they do not, every rank raises. One thread at a time drives a
    communicator; calls from several threads are put in one order, which must be the same on all ranks. After
    a failure a communicator stays unusable: each further call raises and says why.

    Tensors are dense CPU tensors of the dtypes in `ringred.ops.SUPPORTED`. Every collective takes
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
        self.model = machine_model(transport.name, self.hosts)
        self._segment_bytes = self.config.segment_bytes or transport.segment_bytes
        self.tracer: Tracer | None = None
        if self.config.trace and name == "world":
            self.start_trace(self.config.trace)
        self._order = threading.RLock()
        self._progress = Progress(f"ringred-{name}-{self.rank}")
        self._sequence = 0
        self._pair_sequence: dict[tuple[int, int], int] = {}
        self._splits = 0
        self._outgoing: deque[list[Request]] = deque()
        self._programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        self._calls: dict[tuple[Any, ...], _Call] = {}
        self._current: tuple[int, str, str] | None = None
        self._children: weakref.WeakSet[Communicator] = weakref.WeakSet()
        self._failure: RingredError | None = None
        self._closed = False
        _live.add(self)

    # ------------------------------------------------------------------ making communicators

    @classmethod
    def from_mpi(cls, comm: Any = None, *, config: Config | None = None) -> Communicator:
        """From an mpi4py communicator (`COMM_WORLD` by default), of which it takes duplicates. Collective.

        Raises `TransportUnavailable` where mpi4py or an MPI library is missing.
        """
        try:
            from ringred.transports import mpi
        except (ImportError, RuntimeError) as failure:
            raise TransportUnavailable(
                f"MPI cannot be used: {failure}; pip install 'ringred[mpi]' brings mpi4py and an MPI"
            ) from failure
        comm = mpi.world() if comm is None else comm
        names = mpi.world_hosts(comm, host_name())
        return cls(mpi.MpiTransport(comm), hosts=host_indices(names), config=config)

    @classmethod
    def from_store(cls, store: Any, rank: int, size: int, *, config: Config | None = None) -> Communicator:
        """From a torch store (`torch.distributed.Store`) that all `size` ranks share. Collective.

        Gloo connects the ranks. Raises `TransportUnavailable` if not all of them come before the timeout.
        """
        from ringred.transports import torch_p2p

        config = config or Config.from_environment()
        names = torch_p2p.store_hosts(store, rank, size, host_name(), config.timeout)
        # Ranks of one host need no other address than the loopback, and then nobody else can connect.
        address = config.interface or ("127.0.0.1" if len(set(names)) == 1 else None)
        transport = torch_p2p.TorchP2PTransport(store, rank, size, config.timeout, address)
        return cls(transport, hosts=host_indices(names), config=config)

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
        label = f"{self.name}/{self._splits}.{color}"
        transport = self.transport.subset(members, label)
        child = Communicator(transport, hosts=[self.hosts[rank] for rank in members], config=self.config, name=label)
        self._children.add(child)
        return child

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
    def all_reduce(
        self,
        tensor: Tensor,
        op: object = ReduceOp.SUM,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work[None] | None:
        """Combines `tensor` over all ranks, in place: afterwards every rank holds the same bits."""
        kind = reduce_op(op)
        flat, back = self._flat("all_reduce", tensor, kind)
        call = self._call("all_reduce", flat, flat.numel(), kind, algorithm=algorithm, grid=grid)
        if call.algorithm.native:
            return self._launch(call, lambda: self._native(call, flat, kind, back), async_op)
        return self._launch(call, lambda: self._whole_plan(call, flat, kind, back), async_op)

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
        kind = reduce_op(op)
        flat, back = self._flat("all_reduce", tensor, kind)
        if back is not None:
            raise UnsupportedTensor("all_reduce_init: expected a contiguous tensor, whose memory stays in place")
        call = self._call("all_reduce", flat, flat.numel(), kind, algorithm=algorithm, grid=grid)
        if call.algorithm.native:
            sides: Callable[[], _Sides | None] = lambda: self._native(call, flat, kind, None)  # noqa: E731
        else:
            plan = self._whole_plan(call, flat, kind, None)
            sides = lambda: plan  # noqa: E731
        return PersistentAllReduce(self, call, sides)

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
        kind = reduce_op(op)
        shares = self._shares("reduce_scatter", input, kind)
        flat, back = self._flat("reduce_scatter", output, kind, fill=False)
        bounds = _lengths_to_bounds([share.numel() for share in shares])
        lo, hi = bounds[self.rank]
        self._expect("reduce_scatter", "output", flat, hi - lo, shares[0].dtype)
        call = self._call("reduce_scatter", flat, bounds[-1][1], kind, algorithm=algorithm, grid=grid, bounds=bounds)

        def plan() -> _Sides:
            work = torch.cat(shares) if len(shares) > 1 else shares[0].clone()
            folder = Folder(kind, flat.dtype, self.size)
            home = call.algorithm.home(call.group)
            units = [bounds[owner] for owner in home]
            bound = self._bind(call, units, [Piece(0, work)], folder)
            before = (lambda: folder.scale_first(work)) if folder.scales_first else None
            return _Sides(bound, before, _then(lambda: flat.copy_(work[lo:hi]), back))

        return self._launch(call, plan, async_op)

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
        shares, back = self._outputs("all_gather", output)
        flat, _ = self._flat("all_gather", tensor, None, written=False)
        self._expect("all_gather", f"share {self.rank} of output", shares[self.rank], flat.numel(), flat.dtype)
        bounds = _lengths_to_bounds([share.numel() for share in shares])
        call = self._call("all_gather", flat, bounds[-1][1], None, algorithm=algorithm, grid=grid, bounds=bounds)

        def plan() -> _Sides:
            units = [bounds[owner] for owner in call.algorithm.home(call.group)]
            pieces = [Piece(lo, share) for (lo, _), share in zip(bounds, shares, strict=True)]
            own = shares[self.rank]
            return _Sides(self._bind(call, units, pieces, None), lambda: _copy(own, flat), back)

        return self._launch(call, plan, async_op)

    def broadcast(
        self, tensor: Tensor, src: int = 0, *, algorithm: str = "auto", async_op: bool = False
    ) -> Work[None] | None:
        """Copies `tensor` of rank `src` into that of every rank."""
        self._check_peer("broadcast", "src", src)
        flat, back = self._flat("broadcast", tensor, None)
        call = self._call("broadcast", flat, flat.numel(), None, algorithm=algorithm, root=src)
        after = back if self.rank != src else None
        return self._launch(call, lambda: self._whole_plan(call, flat, None, after), async_op)

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
        kind = reduce_op(op)
        flat, back = self._flat("reduce", tensor, kind)
        call = self._call("reduce", flat, flat.numel(), kind, algorithm=algorithm, root=dst)

        def plan() -> _Sides:
            mine = flat if self.rank == dst else flat.clone()
            return self._whole_plan(call, mine, kind, back if self.rank == dst else None)

        return self._launch(call, plan, async_op)

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
        flat, _ = self._flat("gather", tensor, None, written=False)
        if self.rank != dst:
            self._expect_none("gather", "output", output, dst)
            shares, back = [flat.new_empty(0)] * self.size, None
        else:
            if output is None:
                raise ValueError(f"gather: rank {self.rank} is dst and expected an output, got None")
            shares, back = self._outputs("gather", output)
            self._expect("gather", f"share {self.rank} of output", shares[dst], flat.numel(), flat.dtype)
        call = self._call("gather", flat, None, None, root=dst)

        def plan() -> _Sides:
            mine = shares if self.rank == dst else [*shares[: self.rank], flat, *shares[self.rank + 1 :]]
            before = (lambda: _copy(shares[dst], flat)) if self.rank == dst else None
            return self._pieces_plan(call, mine, before, back)

        return self._launch(call, plan, async_op)

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
        flat, back = self._flat("scatter", tensor, None, fill=False)
        if self.rank != src:
            self._expect_none("scatter", "input", input, src)
            shares = [flat.new_empty(0)] * self.size
        else:
            if input is None:
                raise ValueError(f"scatter: rank {self.rank} is src and expected an input, got None")
            shares = self._shares("scatter", input, None)
            self._expect("scatter", f"share {self.rank} of input", shares[src], flat.numel(), flat.dtype)
        call = self._call("scatter", flat, None, None, root=src)

        def plan() -> _Sides:
            mine = shares if self.rank == src else [*shares[: self.rank], flat, *shares[self.rank + 1 :]]
            before = (lambda: _copy(flat, shares[src])) if self.rank == src else None
            return self._pieces_plan(call, mine, before, back)

        return self._launch(call, plan, async_op)

    def all_to_all(
        self, output: Tensor | Sequence[Tensor], input: Tensor | Sequence[Tensor], *, async_op: bool = False
    ) -> Work[None] | None:
        """Share j of `input` on rank i becomes share i of `output` on rank j. One tensor of equal shares, or a
        list of one tensor a rank, whose lengths may differ as long as both ends agree."""
        outgoing = self._shares("all_to_all", input, None)
        incoming, back = self._outputs("all_to_all", output)
        own = self.rank
        self._expect("all_to_all", f"share {own} of output", incoming[own], outgoing[own].numel(), outgoing[own].dtype)
        call = self._call("all_to_all", incoming[own], None, None)

        def plan() -> _Sides:
            units = [incoming[own].new_empty(0)] * self.size**2
            for peer in range(self.size):
                units[peer * self.size + own] = incoming[peer]
                units[own * self.size + peer] = outgoing[peer]
            return self._pieces_plan(call, units, lambda: _copy(incoming[own], outgoing[own]), back)

        return self._launch(call, plan, async_op)

    def barrier(self, *, async_op: bool = False) -> Work[None] | None:
        """Returns once every rank has called it."""
        token = torch.zeros(1, dtype=torch.uint8)
        call = self._call("barrier", token, 1, ReduceOp.MAX)
        return self._launch(call, lambda: self._whole_plan(call, token, ReduceOp.MAX, None), async_op)

    def send(self, tensor: Tensor, dst: int, *, async_op: bool = False) -> Work[None] | None:
        """Sends `tensor` to rank `dst`, which calls `recv`. Calls between two ranks are matched in their order.

        With `async_op` the tensor is copied and the call done at once, so that ranks may send to each other
        before they receive. The other way round they wait for each other: one thread does all, in order.
        """
        return self._pair("send", tensor, self.rank, dst, async_op)

    def recv(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work[None] | None:
        """Receives into `tensor` what rank `src` sends."""
        return self._pair("recv", tensor, src, self.rank, async_op)

    # ------------------------------------------------------------------ what it says of itself

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this rank's host, itself among them."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    @property
    def counters(self) -> Counters:
        """Messages and bytes that this rank has sent and received so far."""
        return self.transport.counters

    def explain(self, nbytes: int, collective: str = "all_reduce") -> str:
        """The algorithms for `nbytes` bytes with their predicted times; the first is what "auto" takes."""
        from tabulate import tabulate

        found = candidates(collective, self.size, nbytes, self.model, segment_bytes=self._segment_bytes)
        rows = [(c.name, "x".join(map(str, c.grid)) if c.grid else "", f"{c.seconds * 1e6:.1f}") for c in found]
        head = f"{collective}, {nbytes} bytes, {self.size} ranks on {len(set(self.hosts))} hosts, {self.transport.name}"
        return f"{head}\n{tabulate(rows, headers=['algorithm', 'grid', 'predicted µs'])}"

    def start_trace(self, path: str) -> Tracer:
        """From here on events are kept; `close()` writes them as a Chrome trace to `path` (the rank goes in)."""
        self.tracer = Tracer(self.rank, self.size, path)
        return self.tracer

    @property
    def closed(self) -> bool:
        return self._closed

    # ------------------------------------------------------------------ ending

    def abort(self, cause: BaseException) -> None:
        """Tells every rank that this one failed with `cause` and takes no further part; they all raise."""
        if self._failure is None and not self._closed:
            self._failure = PeerFailed(f"rank {self.rank}: gave this communicator up after {cause!r}")
            number, call, site = self._current or (self._sequence, "no collective", "")
            what = f"{type(cause).__name__}: {cause}"[:1000]
            self.transport.abort(Report(self.rank, RAISED, -1, number, call, site, 0.0, what).dump())
            for child in list(self._children):
                child.abort(cause)

    def close(self) -> None:
        """Finishes what is in flight and gives everything back. A second call does nothing."""
        with self._order:
            if self._closed:
                return
            self._closed = True
        self._progress.close()
        if self._failure is None:
            with contextlib.suppress(Fault):  # a peer that no longer receives is not this rank's trouble
                while self._outgoing:
                    self._wait_sent(self._outgoing.popleft())
        self.transport.close()
        if self.tracer is not None:
            self.tracer.write()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> None:
        if value is not None:
            self.abort(value)
        self.close()

    def __repr__(self) -> str:
        return f"<Communicator {self.name}: rank {self.rank} of {self.size} over {self.transport.name}>"

    # ------------------------------------------------------------------ tensors in and out

    def _flat(
        self, where: str, tensor: Tensor, op: ReduceOp | None, *, fill: bool = True, written: bool = True
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """`tensor` as 1-D contiguous memory, and what writes it back where that is a copy.

        `fill` says that its values count, `written` that it will be written to.
        """
        where = f"rank {self.rank}: {where}"
        if not isinstance(tensor, Tensor):
            raise UnsupportedTensor(f"{where}: expected a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise UnsupportedTensor(f"{where}: expected a dense (strided) tensor, got layout {tensor.layout}")
        if tensor.device.type != "cpu":
            raise UnsupportedTensor(
                f"{where}: expected a CPU tensor, got one on {tensor.device}; {self.transport.name} moves CPU memory"
            )
        check_dtype(where, tensor.dtype, op)
        detached = tensor.detach()
        if written and any(
            stride == 0 and extent > 1 for stride, extent in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise UnsupportedTensor(f"{where}: expected memory of its own for each element, got an expanded tensor")
        if detached.is_contiguous() and not detached.is_conj() and not detached.is_neg():
            # as_strided, for view(-1) keeps an odd stride where there is at most one element.
            return detached.as_strided((detached.numel(),), (1,)), None
        copy = (
            detached.resolve_conj().resolve_neg().contiguous()
            if fill
            else torch.empty_like(detached, memory_format=torch.contiguous_format)
        )
        if copy.data_ptr() == detached.data_ptr():
            copy = copy.clone()

        def write_back() -> None:
            detached.copy_(copy)

        return copy.view(-1), write_back

    def _shares(self, where: str, tensors: Tensor | Sequence[Tensor], op: ReduceOp | None) -> list[Tensor]:
        """One flat tensor for each rank."""
        if isinstance(tensors, Tensor):
            self._expect_equal_shares(where, tensors)
            flat, _ = self._flat(where, tensors, op, written=False)
            return [flat[lo:hi] for lo, hi in share_bounds(flat.numel(), self.size)]
        self._expect_list(where, tensors)
        return [self._flat(where, tensor, op, written=False)[0] for tensor in tensors]

    def _outputs(
        self, where: str, tensors: Tensor | Sequence[Tensor]
    ) -> tuple[list[Tensor], Callable[[], None] | None]:
        """One flat tensor for each rank to write to, and what writes back those that are copies."""
        if isinstance(tensors, Tensor):
            self._expect_equal_shares(where, tensors)
            flat, back = self._flat(where, tensors, None, fill=False)
            return [flat[lo:hi] for lo, hi in share_bounds(flat.numel(), self.size)], back
        self._expect_list(where, tensors)
        pairs = [self._flat(where, tensor, None, fill=False) for tensor in tensors]
        backs = [back for _, back in pairs if back is not None]
        return [flat for flat, _ in pairs], _then(*backs) if backs else None

    def _expect_equal_shares(self, where: str, tensor: Tensor) -> None:
        if tensor.numel() % self.size:
            raise ValueError(
                f"rank {self.rank}: {where}: expected a multiple of {self.size} elements, got {tensor.numel()}; "
                "shares of different lengths are given as a list of tensors"
            )

    def _expect_list(self, where: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != self.size:
            raise ValueError(f"rank {self.rank}: {where}: expected {self.size} tensors, got {len(tensors)}")
        dtypes = {tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}
        if len(dtypes) > 1:
            raise UnsupportedTensor(f"rank {self.rank}: {where}: expected one dtype, got {dtypes}")

    def _expect(self, where: str, what: str, tensor: Tensor, elements: int, dtype: torch.dtype) -> None:
        if tensor.numel() != elements or tensor.dtype != dtype:
            raise ValueError(
                f"rank {self.rank}: {where}: {what} expected {elements} elements of {dtype}, "
                f"got {tensor.numel()} of {tensor.dtype}"
            )

    def _expect_none(self, where: str, what: str, given: object, root: int) -> None:
        if given is not None:
            raise ValueError(f"rank {self.rank}: {where}: {what} is for rank {root} only, expected None here")

    def _check_peer(self, where: str, what: str, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise ValueError(f"rank {self.rank}: {where}: {what} {peer} is no rank of 0..{self.size - 1}")

    # ------------------------------------------------------------------ calls and plans

    def _call(
        self,
        collective: str,
        like: Tensor,
        count: int | None,
        op: ReduceOp | None,
        *,
        algorithm: str = "auto",
        grid: Sequence[int] | None = None,
        root: int = 0,
        bounds: Sequence[tuple[int, int]] | None = None,
    ) -> _Call:
        """The call with its algorithm settled. `count` is the number of elements, None where ranks differ."""
        shape = tuple(grid) if grid is not None else None
        lengths = None if bounds is None else tuple(hi for _, hi in bounds)
        key = (collective, like.dtype, count, op, algorithm, shape, root, lengths)
        known = self._calls.get(key)
        if known is not None:
            return known
        nbytes = (count or 0) * like.element_size()
        if algorithm == "auto" and shape is None:
            entry, best = choose(collective, nbytes, self.model, root)
            shape = best.grid
        elif algorithm == "auto":
            entry = lookup(collective, "torus")
        else:
            entry = lookup(collective, algorithm)
            if shape is None and entry.grids is not None and len(set(self.hosts)) > 1:
                shape = local_grid(self.hosts)
        group = entry.group(self.size, root, shape, segments_for(nbytes, self._segment_bytes))
        if op is None:
            parts = [str(like.dtype).removeprefix("torch.")]
        else:
            parts = [op.value, str(like.dtype).removeprefix("torch.")]
        if count is not None:
            parts.append(f"{count} element{'' if count == 1 else 's'}")
        if root or collective in ("broadcast", "reduce", "gather", "scatter"):
            parts.append(f"root {root}")
        by = entry.name if group.grid is None else f"{entry.name} {'x'.join(map(str, group.grid))}"
        text = f"{collective} ({', '.join(parts)}, {by})"
        described = f"{self.name} {text} {group} {lengths} {self._segment_bytes}"
        digest = int.from_bytes(hashlib.blake2b(described.encode(), digest_size=7).digest(), "little")
        call = _Call(collective, text, entry, group, digest)
        if len(self._calls) > 4 * _PROGRAMS:
            self._calls.clear()
        self._calls[key] = call
        return call

    def _program(self, call: _Call, bounds: Sequence[tuple[int, int]], itemsize: int, alike: bool) -> Program:
        limit = self._segment_bytes if alike else _GIB
        segment = max(1, limit // itemsize)
        key = (call.collective, call.algorithm.name, call.group, tuple(bounds), segment)
        program = self._programs.get(key)
        if program is not None:
            self._programs.move_to_end(key)
            return program
        rank = self.rank
        keep: Callable[[int], bool] = lambda unit: True  # noqa: E731
        if call.collective == "reduce_scatter":
            home = call.algorithm.home(call.group)
            keep = lambda unit: home[unit] == rank  # noqa: E731
        elif call.collective == "reduce":
            keep = lambda unit: rank == call.group.root  # noqa: E731
        # Shares lie in tensors of their own; one tensor in adjacent units.
        merge = call.collective in ("all_reduce", "broadcast", "reduce", "barrier")
        program = lower(rank, call.algorithm.steps(call.group)(rank), bounds, segment, keep=keep, merge=merge)
        self._programs[key] = program
        while len(self._programs) > _PROGRAMS:
            self._programs.popitem(last=False)
        return program

    def _bind(
        self,
        call: _Call,
        bounds: Sequence[tuple[int, int]],
        pieces: Sequence[Piece],
        folder: Folder | None,
        alike: bool = True,
    ) -> Plan:
        """`alike`: all ranks know the same `bounds`, so that they cut messages into the same segments."""
        program = self._program(call, bounds, pieces[0].tensor.element_size(), alike)
        return bind(program, pieces, folder)

    def _whole_plan(self, call: _Call, flat: Tensor, op: ReduceOp | None, after: Callable[[], None] | None) -> _Sides:
        """The plan of a collective on one tensor that every rank holds whole."""
        folder = None if op is None else Folder(op, flat.dtype, self.size)
        bounds = share_bounds(flat.numel(), call.algorithm.units(call.group))
        plan = self._bind(call, bounds, [Piece(0, flat)], folder)
        before = None
        if folder is not None and folder.scales_first and self.size > 1:
            before = lambda: folder.scale_first(flat)  # noqa: E731
        return _Sides(plan, before, after)

    def _pieces_plan(
        self,
        call: _Call,
        units: Sequence[Tensor],
        before: Callable[[], None] | None,
        after: Callable[[], None] | None,
    ) -> _Sides:
        """The plan of a collective whose unit `u` is the tensor `units[u]`, of which ranks may know few.

        Each is one message: their lengths are no part of the contract, so only whole ones can be compared.
        """
        bounds = _lengths_to_bounds([unit.numel() for unit in units])
        pieces = [Piece(lo, unit) for (lo, hi), unit in zip(bounds, units, strict=True) if hi > lo]
        pieces = pieces or [Piece(0, units[0])]
        return _Sides(self._bind(call, bounds, pieces, None, alike=False), before, after)

    def _pair(self, what: str, tensor: Tensor, src: int, dst: int, async_op: bool) -> Work[None] | None:
        peer = dst if what == "send" else src
        self._check_peer(what, "dst" if what == "send" else "src", peer)
        if peer == self.rank:
            raise ValueError(f"rank {self.rank}: {what} to or from itself")
        flat, back = self._flat(what, tensor, None, fill=what == "send", written=what == "recv")
        entry = lookup("send_recv", "direct")
        place = min(src, dst), max(src, dst)
        group = entry.group(2, root=place.index(src))
        text = f"send {src}→{dst} ({str(flat.dtype).removeprefix('torch.')}, {flat.numel()} elements)"
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
        call = _Call("send_recv", text, entry, group, digest)
        if what == "send" and async_op:
            copy = flat.clone()
            return self._launch(call, lambda: self._post_send(copy, dst), async_op, pair=(src, dst))

        def plan() -> _Sides:
            bounds = [(0, flat.numel())]
            segment = max(1, self._segment_bytes // flat.element_size())
            # The schedule is written for ranks 0 and 1; `place` gives them their real numbers.
            steps = entry.steps(group)(place.index(self.rank))
            renamed = [tuple(op._replace(peer=place[op.peer]) for op in step) for step in steps]
            program = lower(self.rank, renamed, bounds, segment)
            return _Sides(bind(program, [Piece(0, flat)], None), None, back)

        return self._launch(call, plan, async_op, pair=(src, dst))

    def _post_send(self, copy: Tensor, dst: int) -> None:
        """Sends memory that nobody else writes to, and waits for it later."""
        step = max(1, self._segment_bytes // copy.element_size())
        parts = [copy[lo : lo + step] for lo in range(0, max(copy.numel(), 1), step)]
        self._outgoing.append([self.transport.isend(dst, part) for part in parts])
        if len(self._outgoing) > _OUTGOING:
            self._wait_sent(self._outgoing.popleft())

    def _wait_sent(self, requests: Sequence[Request]) -> None:
        deadline = time.monotonic() + self.config.timeout
        for request in requests:
            self.transport.wait(request, deadline)

    # ------------------------------------------------------------------ running

    def _launch(
        self,
        call: _Call,
        prepare: Callable[[], _Sides | None],
        async_op: bool,
        pair: tuple[int, int] | None = None,
    ) -> Work[None] | None:
        site = _call_site()
        with self._order:
            if self._closed:
                raise PeerFailed(f"rank {self.rank}: {call.text}: this communicator is closed")
            self._check_usable(call)
            if not async_op and self._progress.is_current():
                raise RingredError(
                    f"rank {self.rank}: {call.text}: called from a callback on the progress thread, which would wait "
                    "for itself; use async_op=True there"
                )
            if pair is None:
                self._sequence += 1
                number = self._sequence
            else:
                number = self._pair_sequence[pair] = self._pair_sequence.get(pair, 0) + 1

            def job() -> None:
                self._run(call, number, site, prepare, pair is not None)

            if not async_op and self._progress.idle():
                job()
                return None
            work: Work[None] = Work(f"rank {self.rank}: {_numbered(call, number)} at {site}")
            self._progress.submit(lambda: work.finish(job))
        if async_op:
            return work
        work.wait()
        return None

    def _check_usable(self, call: _Call) -> None:
        if self._failure is not None:
            raise type(self._failure)(
                f"rank {self.rank}: {call.text}: this communicator is unusable since an earlier failure: "
                f"{self._failure}"
            ) from self._failure

    def _run(self, call: _Call, number: int, site: str, prepare: Callable[[], _Sides | None], of_a_pair: bool) -> None:
        self._check_usable(call)
        # Ranks count collectives alike; what two of them do between themselves has the number of the one before.
        self._current = (self._sequence if of_a_pair else number, _numbered(call, number), site)
        began = time.monotonic()
        tracer = self.tracer
        start = time.monotonic_ns() if tracer is not None else 0
        try:
            contract = (call.digest ^ number * 0x9E3779B97F4A7C15) & ((1 << 62) - 1)
            self.transport.begin(contract, -1 if of_a_pair else number)
            sides = prepare()
            if sides is not None:
                if sides.before is not None:
                    sides.before()
                run(sides.plan, self.transport, began + self.config.timeout, tracer)
                if sides.after is not None:
                    sides.after()
        except Fault as fault:
            self._failure = self._diagnosed(fault, time.monotonic() - began)
            raise self._failure from fault
        except RingredError:
            raise
        except BaseException as failure:
            self.abort(failure)
            raise
        finally:
            self._current = None
        if tracer is not None:
            tracer.span("collective", _numbered(call, number), start, time.monotonic_ns(), site=site)

    def _diagnosed(self, fault: Fault, waited: float) -> RingredError:
        """Publishes what this rank saw, reads what the others saw, and makes one exception of it."""
        number, call, site = self._current or (self._sequence, "no collective", "")
        mine = Report(self.rank, fault.kind, fault.peer, number, call, site, waited, fault.detail[:1000])
        self.transport.abort(mine.dump())
        loaded = {rank: Report.load(text) for rank, text in self.transport.reports(_REPORT_WAIT).items()}
        reports = {rank: report for rank, report in loaded.items() if report is not None}
        return diagnose(mine, reports, self.size)

    def _native(self, call: _Call, flat: Tensor, op: ReduceOp, after: Callable[[], None] | None) -> _Sides | None:
        native = getattr(self.transport, "native_all_reduce", None)
        if native is None:
            raise UnknownAlgorithm(
                f"rank {self.rank}: {call.text}: {self.transport.name} has no all-reduce of its own; MPI has"
            )
        if not native(flat, op.value, time.monotonic() + self.config.timeout):
            raise UnsupportedTensor(f"rank {self.rank}: {call.text}: MPI has no {op.value} of {flat.dtype}")
        if after is not None:
            after()
        return None


class PersistentAllReduce:
    """An all-reduce whose plan is made: `start()` runs it on what its tensor then holds."""

    def __init__(self, comm: Communicator, call: _Call, sides: Callable[[], _Sides | None]) -> None:
        self._comm, self._call, self._sides = comm, call, sides

    @property
    def algorithm(self) -> str:
        """The name of the algorithm that it runs."""
        return self._call.algorithm.name

    def start(self) -> Work[None]:
        """Starts it, to run on the progress thread."""
        work = self._comm._launch(self._call, self._sides, async_op=True)
        assert work is not None, "asynchronous calls return their work"
        return work


def _numbered(call: _Call, number: int) -> str:
    head, _, rest = call.text.partition(" ")
    return f"{head} #{number} {rest}"


def _lengths_to_bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    bounds, lo = [], 0
    for length in lengths:
        bounds.append((lo, lo + length))
        lo += length
    return bounds


def _copy(target: Tensor, source: Tensor) -> None:
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)


def _then(*actions: Callable[[], object] | None) -> Callable[[], None]:
    def all_of_them() -> None:
        for action in actions:
            if action is not None:
                action()

    return all_of_them


def _call_site() -> str:
    """Where in the user's program the collective was called: the innermost frame outside of ringred and torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@atexit.register
def _close_all() -> None:
    for comm in list(_live):
        comm.close()


def abort_all(cause: BaseException) -> None:
    """Tells the peers of every communicator that this process failed with `cause`."""
    for comm in list(_live):
        comm.abort(cause)
