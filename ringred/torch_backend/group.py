"""`backend="ringred"`: torch.distributed programs on a communicator.

`torch.distributed.init_process_group("ringred")` makes a `RingredGroup` of CPU and CUDA tensors from the store that
torch passes in. Collectives go through a `Communicator` (shared memory on a host, Gloo between hosts). send and recv,
which have tags and may receive from any source, go through a separate Gloo group, so that neither waits for the other.

The names of the methods are torch's: its Python functions call them, and so does its C++ (DDP's reducer, functional
collectives) by way of the trampoline of `ProcessGroup`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as _distributed
from torch import Tensor

from ringred.communicator import Communicator
from ringred.errors import TransportUnavailable
from ringred.runtime import lifetime
from ringred.runtime.compiling import never_compiled
from ringred.runtime.config import Config, restart_count
from ringred.runtime.work import Work
from ringred.torch_backend.mail import Mail, Message
from ringred.torch_backend.meeting import meet
from ringred.torch_backend.reducing import operation, sparse_all_reduce
from ringred.torch_backend.versions import Backend, among_others, group_of
from ringred.torch_backend.works import RingredWork
from ringred.transports.stores import corner
from ringred.transports.torch_p2p import bind_address

dist: Any = _distributed  # torch declares no types for most of what is used here

__all__ = ["RingredGroup", "create", "monitored_barrier"]

_open: set[_Collectives] = set()
_T = TypeVar("_T")
Started: TypeAlias = Work[None] | None


@never_compiled
class _Collectives:
    """Implements torch's process-group methods on the communicator `comm`. `store` is the group's own."""

    def __init__(self, comm: Communicator, store: Any, timeout: float) -> None:
        super().__init__(comm.rank, comm.size)  # type: ignore[call-arg]
        self.comm = comm
        # A store may outlive a group and be given to its successor, which must not read what the first wrote.
        self._store, self._own = store, corner(_of_this_life(store), comm.rank)
        self._timeout = timeout
        self._name, self._description = "", ""
        address = bind_address(comm.hosts, comm.config.interface)
        self._mail = Mail(self._own, comm.rank, comm.size, timeout, address)
        self._coalescing: list[Work[None]] | None = None
        self._barriers = 0
        _open.add(self)  # keeps this object alive: torch's C++ refers only to the C++ part

    # ------------------------------------------------------------------ who it is

    def getBackendName(self) -> str:  # noqa: N802
        return "ringred"

    name = getBackendName

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    def get_group_store(self) -> Any:
        return self._store

    supports_coalescing = supports_splitting = False  # torch reads these from a device's backend

    def _get_backend(self, device: torch.device) -> _Collectives:
        return self

    def set_timeout(self, timeout: timedelta) -> None:
        """From here on a collective fails after `timeout`."""
        self._timeout = timeout.total_seconds()
        self.comm.set_timeout(self._timeout)
        self._mail.set_timeout(timeout)

    # ------------------------------------------------------------------ reducing

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> RingredWork:
        kind, factor = operation(opts)
        if len(tensors) == 1 and tensors[0].layout is torch.sparse_coo:
            sparse_all_reduce(self.comm, tensors[0], kind, factor)
            return self._work([], tensors)

        def start(tensor: Tensor, async_op: bool) -> Started:
            if factor is not None:
                tensor.detach().mul_(factor)
            return self.comm.all_reduce(tensor, kind, async_op=async_op)

        return self._each(opts, tensors, start, tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> RingredWork:
        kind, factor = operation(opts)

        def start(tensor: Tensor, async_op: bool) -> Started:
            if factor is not None:
                tensor.detach().mul_(factor)
            return self.comm.reduce(tensor, opts.rootRank, kind, async_op=async_op)

        return self._each(opts, tensors, start, tensors)

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor] | Tensor], opts: Any = None
    ) -> RingredWork:
        """Each of `inputs` is a list of one tensor per rank, or one tensor of equal shares."""
        kind, factor = operation(opts)

        def start(pair: tuple[Tensor, Sequence[Tensor] | Tensor], async_op: bool) -> Started:
            output, shares = pair
            if factor is not None:
                shares = shares * factor if isinstance(shares, Tensor) else [share * factor for share in shares]
            return self.comm.reduce_scatter(output, shares, kind, async_op=async_op)

        return self._each(opts, zip(outputs, inputs, strict=True), start, outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced = reduce_scatter

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, opts: Any = None) -> RingredWork:
        return self.reduce_scatter([output], [input], opts)

    reduce_scatter_single = _reduce_scatter_base

    # ------------------------------------------------------------------ gathering and spreading

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> RingredWork:
        def start(tensor: Tensor, async_op: bool) -> Started:
            return self.comm.broadcast(tensor, opts.rootRank, async_op=async_op)

        return self._each(opts, tensors, start, tensors)

    def allgather(
        self, outputs: Sequence[Sequence[Tensor] | Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> RingredWork:
        """Each of `outputs` is a list of one tensor per rank, or one tensor of equal shares."""

        def start(pair: tuple[Sequence[Tensor] | Tensor, Tensor], async_op: bool) -> Started:
            return self.comm.all_gather(*pair, async_op=async_op)

        return self._each(opts, zip(outputs, inputs, strict=True), start, _flattened(outputs))

    allgather_into_tensor_coalesced = all_gather_single_coalesced = allgather

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> RingredWork:
        return self.allgather([output], [input], opts)

    all_gather_single = _allgather_base

    def allgather_coalesced(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> RingredWork:
        # Here there is one list per rank, with a tensor for each input; `allgather` takes one list per input.
        return self.allgather([list(shares) for shares in zip(*outputs, strict=True)], inputs, opts)

    def gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> RingredWork:
        root = opts.rootRank

        def start(pair: tuple[Tensor, Sequence[Tensor] | None], async_op: bool) -> Started:
            return self.comm.gather(*pair, root, async_op=async_op)

        there = outputs if self.comm.rank == root else [None] * len(inputs)
        return self._each(opts, zip(inputs, there, strict=True), start, _flattened(outputs))

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> RingredWork:
        root = opts.rootRank

        def start(pair: tuple[Tensor, Sequence[Tensor] | None], async_op: bool) -> Started:
            return self.comm.scatter(*pair, root, async_op=async_op)

        there = inputs if self.comm.rank == root else [None] * len(outputs)
        return self._each(opts, zip(outputs, there, strict=True), start, outputs)

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> RingredWork:
        def start(pair: tuple[Sequence[Tensor], Sequence[Tensor]], async_op: bool) -> Started:
            return self.comm.all_to_all(*pair, async_op=async_op)

        return self._each(opts, [(outputs, inputs)], start, outputs)

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], opts: Any = None
    ) -> RingredWork:
        return self.alltoall(self._rows(output, output_sizes, "output"), self._rows(input, input_sizes, "input"), opts)

    all_to_all_single = alltoall_base

    def _rows(self, tensor: Tensor, sizes: Sequence[int], what: str) -> list[Tensor]:
        """Splits `tensor` into one part per rank, with these numbers of rows, or equal ones if `sizes` is empty."""
        tensor = tensor.reshape(1) if not tensor.dim() else tensor
        size, rows = self.comm.size, tensor.shape[0]
        sizes = list(sizes) or [rows // size] * size
        if len(sizes) != size or sum(sizes) != rows:
            raise ValueError(
                f"rank {self.comm.rank}: all_to_all: {what} expected {size} shares of {rows} rows together, got {sizes}"
            )
        return list(tensor.split(sizes))

    def barrier(self, opts: Any = None) -> RingredWork:
        return self._each(opts, [None], lambda _, async_op: self.comm.barrier(async_op=async_op), [])

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """See `ringred.torch_backend.monitored_barrier`."""
        seconds = self._timeout if timeout is None else getattr(timeout, "total_seconds", lambda: float(timeout))()
        store = dist.PrefixStore(f"monitored-{self._barriers}", self._own)
        self._barriers += 1
        meet(store, self.comm.rank, self.comm.size, seconds, wait_all_ranks)

    # ------------------------------------------------------------------ messages

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int = 0) -> Message:
        return self._mail.send(tensors, dst, tag)

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int = 0) -> Message:
        return self._mail.recv(tensors, src, tag)

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Message:
        return self._mail.recv_anysource(tensors, tag)

    # ------------------------------------------------------------------ several as one

    def start_coalescing(self, device: torch.device | None = None) -> None:
        self._coalescing = []

    def end_coalescing(self, device: torch.device | None = None) -> RingredWork:
        works, self._coalescing = self._coalescing or [], None
        return RingredWork(works, [])

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,
    ) -> RingredGroup | None:
        """A new group of `ranks` (rank numbers in this group); None on other ranks, which need not call this."""
        if self.comm.rank not in ranks:
            return None
        name = group_name or f"{self._name}/split/{','.join(map(str, ranks))}"
        seconds = self._timeout if timeout is None else timeout.total_seconds()
        part = RingredGroup(
            self.comm.subset(list(ranks), name, timeout=seconds), dist.PrefixStore(name, self._store), seconds
        )
        part._set_group_name(name)
        part._set_group_desc(group_desc or "")
        return part

    _start_coalescing, _end_coalescing = start_coalescing, end_coalescing

    # ------------------------------------------------------------------ ending

    def abort(self) -> None:
        """Gives the group up: every rank that waits in it raises."""
        self.comm.abort(RuntimeError("abort() was called"))
        self._mail.abort()

    def shutdown(self) -> None:
        """Finishes what is in flight and gives everything back."""
        _open.discard(self)
        try:
            self.comm.close()
        finally:
            self._mail.shutdown()

    # ------------------------------------------------------------------ helpers

    def _each(
        self, opts: Any, calls: Iterable[_T], start: Callable[[_T, bool], Started], outputs: Sequence[Tensor]
    ) -> RingredWork:
        """Starts a collective for each of `calls`; a synchronous one runs at once, on this thread."""
        async_op = getattr(opts, "asyncOp", True) or self._coalescing is not None
        started = [start(call, async_op) for call in calls]
        return self._work([work for work in started if work is not None], outputs)

    def _work(self, works: list[Work[None]], outputs: Sequence[Tensor]) -> RingredWork:
        if self._coalescing is not None:
            self._coalescing += works
        return RingredWork(works, list(outputs))


class RingredGroup(_Collectives, dist.ProcessGroup):  # type: ignore[misc]
    """The whole process group: Python calls come straight here."""


if Backend is not None:

    class RingredBackend(_Collectives, Backend):  # type: ignore[misc]
        """The backend of CPU tensors in a process group that has another for other devices."""


def create(options: Any, backend_options: Any = None) -> _Collectives:
    """What torch calls for `init_process_group("ringred")` and `new_group`: a group of the ranks in `options`."""
    kind: Any = RingredGroup
    if among_others():
        if Backend is None:
            raise TransportUnavailable(
                f"backend 'ringred' for the CPU beside another for other devices needs torch 2.14 or newer, this is "
                f"{torch.__version__}; use 'ringred' alone, or ringred.hooks.all_reduce_hook with the other backend"
            )
        kind = RingredBackend
    timeout = options.timeout.total_seconds()
    config = dataclasses.replace(Config.from_environment(), timeout=timeout)
    rank, size, ranks = options.group_rank, options.group_size, list(options.global_ranks_in_group)
    world = group_of(dist.group.WORLD) if dist.is_initialized() else None
    if isinstance(world, _Collectives) and not world.comm.closed and len(ranks) == size:
        comm = world.comm.subset(ranks, options.group_id, timeout=timeout)
    else:
        comm = Communicator.from_store(_of_this_life(options.store), rank, size, config=config)
    lifetime.report_uncaught()
    made: _Collectives = kind(comm, options.store, timeout)
    return made


def _of_this_life(store: Any) -> Any:
    """The part of `store` for this run of the ranks: each restart by torchrun gets a new part."""
    return dist.PrefixStore(f"ringred/{restart_count()}", store)


def monitored_barrier(group: Any = None, timeout: Any = None, wait_all_ranks: bool = False) -> None:
    """A barrier that names the ranks that did not come. Collective among the ranks of `group`.

    As `torch.distributed.monitored_barrier`, which takes no other backend than Gloo. `timeout` is a timedelta, or in
    seconds. Raises `CollectiveTimeout` on every rank that came. Its message names the first missing rank, and then
    lists all of them. With torch's `wait_all_ranks` it names all of them at once.
    """
    found = group_of(dist.group.WORLD if group is None else group)
    if isinstance(found, _Collectives):  # else this rank is no member
        found.monitored_barrier(timeout, wait_all_ranks)


def _flattened(lists: Iterable[Sequence[Tensor] | Tensor]) -> list[Tensor]:
    return [tensor for some in lists for tensor in ([some] if isinstance(some, Tensor) else some)]
