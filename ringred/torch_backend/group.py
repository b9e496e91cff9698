"""`backend="ringred"`: torch.distributed programs on a communicator.

`torch.distributed.init_process_group("ringred")` makes a `RingredGroup` of CPU tensors from the store that torch
passes in. Collectives go through a `Communicator` (shared memory on a host, Gloo between hosts). send and recv, which
have tags and may receive from any source, go through a separate Gloo group, so that neither waits for the other.

The names of the methods are torch's: its Python functions call them, and so does its C++ (DDP's reducer, functional
collectives) by way of the trampoline of `ProcessGroup`.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as _distributed
from torch import Tensor

from ringred.communicator import Communicator
from ringred.errors import CollectiveTimeout, PeerFailed, RingredError, TransportUnavailable, UnsupportedTensor
from ringred.runtime.compiling import never_compiled
from ringred.runtime.config import Config, restart_count
from ringred.runtime.folds import ReduceOp
from ringred.runtime.futures import future_of
from ringred.runtime.work import Work
from ringred.torch_backend.versions import Backend, among_others, group_of
from ringred.transports.torch_p2p import bind_address, corner, gloo_group

dist: Any = _distributed  # torch declares no types for most of what is used here

__all__ = ["RingredGroup", "create", "monitored_barrier"]

_LOOK_SECONDS = 0.002  # between two looks into the store
_VERDICT_SECONDS = 1.0  # how much longer than rank 0 the others wait for its list of missing ranks

_open: set[_Collectives] = set()
_T = TypeVar("_T")
_TYPES = dist.ReduceOp.RedOpType
_KINDS = {
    _TYPES.SUM: ReduceOp.SUM,
    _TYPES.AVG: ReduceOp.AVG,
    _TYPES.PREMUL_SUM: ReduceOp.SUM,
    _TYPES.PRODUCT: ReduceOp.PROD,
    _TYPES.MIN: ReduceOp.MIN,
    _TYPES.MAX: ReduceOp.MAX,
    _TYPES.BAND: ReduceOp.BAND,
    _TYPES.BOR: ReduceOp.BOR,
    _TYPES.BXOR: ReduceOp.BXOR,
}
Started: TypeAlias = Work[None] | None


@never_compiled
class RingredWork(dist.Work):  # type: ignore[misc]
    """One or more collectives in flight, as a torch `Work`. Its future holds `outputs`."""

    def __init__(self, works: list[Work[None]], outputs: list[Tensor]) -> None:
        super().__init__()
        self._works, self._outputs = works, outputs
        self._future: Any = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until all is done. Raises what the communicator raises, or `CollectiveTimeout` after `timeout`."""
        seconds = None if timeout is None or timeout.total_seconds() <= 0 else timeout.total_seconds()
        deadline = None if seconds is None else time.monotonic() + seconds
        for work in self._works:
            work.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return True

    def get_future(self) -> Any:
        """A `torch.futures.Future` of the outputs, which fails with the communicator's exception."""
        if self._future is None:
            self._future = future_of(self._works, self.result)
        return self._future

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        return next((error for error in (work.exception() for work in self._works) if error is not None), None)

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return self._outputs

    def source_rank(self) -> int:
        raise RuntimeError("source_rank: only a receive from any rank has a source")


@never_compiled
class _MailWork(dist.Work):  # type: ignore[misc]
    """A message in flight: wraps Gloo's work and raises its failures as ringred's exceptions."""

    def __init__(self, group: _Collectives, work: Any, what: str, tensors: list[Tensor]) -> None:
        super().__init__()
        self._group, self._work, self._what, self._tensors = group, work, what, tensors
        self._waiting = threading.Lock()  # Gloo's work can be waited for once
        self._done = False
        self._failure: RingredError | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        began = time.monotonic()
        seconds = timeout.total_seconds() if timeout is not None and timeout.total_seconds() > 0 else -1.0
        if not self._waiting.acquire(timeout=seconds):
            raise CollectiveTimeout(f"rank {self._group.comm.rank}: {self._what}: not done after {timeout}")
        try:
            if not self._done:
                self._work.wait(*([timeout] if seconds > 0 else []))
        except RuntimeError as failure:
            self._failure = self._group._mail_failure(self._what, failure, time.monotonic() - began)
        finally:
            self._done = True
            self._waiting.release()
        if self._failure is not None:
            raise self._failure
        return True

    def get_future(self) -> Any:
        raise NotImplementedError("a message has no future, as on Gloo: wait() for it")

    def is_completed(self) -> bool:
        return self._done or bool(self._work.is_completed())

    def is_success(self) -> bool:
        return self.is_completed() and self._failure is None

    def exception(self) -> BaseException | None:
        return self._failure

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        return int(self._work._source_rank())

    _source_rank = source_rank


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
        self._mail = gloo_group(dist.PrefixStore("mail", self._own), comm.rank, comm.size, timeout, address)
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
        self._mail._set_default_timeout(timeout)

    # ------------------------------------------------------------------ reducing

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> RingredWork:
        kind, factor = _operation(opts)
        if len(tensors) == 1 and tensors[0].layout is torch.sparse_coo:
            self._sparse_all_reduce(tensors[0], kind, factor)
            return self._work([], tensors)

        def start(tensor: Tensor, async_op: bool) -> Started:
            if factor is not None:
                tensor.detach().mul_(factor)
            return self.comm.all_reduce(tensor, kind, async_op=async_op)

        return self._each(opts, tensors, start, tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> RingredWork:
        kind, factor = _operation(opts)

        def start(tensor: Tensor, async_op: bool) -> Started:
            if factor is not None:
                tensor.detach().mul_(factor)
            return self.comm.reduce(tensor, opts.rootRank, kind, async_op=async_op)

        return self._each(opts, tensors, start, tensors)

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor] | Tensor], opts: Any = None
    ) -> RingredWork:
        """Each of `inputs` is a list of one tensor per rank, or one tensor of equal shares."""
        kind, factor = _operation(opts)

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

    def _sparse_all_reduce(self, tensor: Tensor, kind: ReduceOp, factor: float | None) -> None:
        """Sums sparse tensors: gathers the entries of all ranks and adds those with the same index."""
        where = f"rank {self.comm.rank}: all_reduce"
        if kind is not ReduceOp.SUM or factor is not None:
            raise UnsupportedTensor(f"{where}: sparse tensors can only be summed, got {kind.value}")
        mine = tensor.coalesce()
        shape = torch.tensor([mine.sparse_dim(), *mine.shape, mine._nnz()])
        shapes = [torch.empty_like(shape) for _ in range(self.comm.size)]
        self.comm.all_gather(shapes, shape)
        if any(not torch.equal(other[:-1], shape[:-1]) for other in shapes):
            raise ValueError(f"{where}: sparse tensors of unlike shapes, by rank: {[s[1:-1].tolist() for s in shapes]}")
        counts = [int(other[-1]) for other in shapes]
        indices = [mine.indices().new_empty(mine.sparse_dim() * count) for count in counts]
        values = [mine.values().new_empty(count, *mine.values().shape[1:]) for count in counts]
        self.comm.all_gather(indices, mine.indices().reshape(-1))
        self.comm.all_gather(values, mine.values())
        places = torch.cat([place.view(mine.sparse_dim(), -1) for place in indices], dim=1)
        tensor.copy_(torch.sparse_coo_tensor(places, torch.cat(values), mine.shape).coalesce())

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
        """See the function of this name. Ranks meet through the store, because a collective might hang."""
        seconds = self._timeout if timeout is None else getattr(timeout, "total_seconds", lambda: float(timeout))()
        rank, size = self.comm.rank, self.comm.size
        store = dist.PrefixStore(f"monitored-{self._barriers}", self._own)
        self._barriers += 1
        where, took = f"rank {rank}: monitored_barrier", f"in {seconds * 1000:.0f} ms"
        began = time.monotonic()
        store.set(f"came/{rank}", "")
        if rank == 0:
            if seconds <= 0:
                raise CollectiveTimeout(f"{where}: Rank 0 timed out in monitoredBarrier: no time was given")
            missing = list(range(1, size))
            while missing and time.monotonic() - began < seconds:
                missing = [peer for peer in missing if not store.check([f"came/{peer}"])]
                time.sleep(_LOOK_SECONDS if missing else 0)
            named = ", ".join(map(str, missing))
            store.set("verdict", named or "all")
            if missing:
                first = f"Ranks {named}" if wait_all_ranks else f"Rank {missing[0]}"
                raise CollectiveTimeout(f"{where}: {first} failed to pass monitoredBarrier {took}; missing: {named}")
            return
        while not store.check(["verdict"]) and time.monotonic() - began < seconds + _VERDICT_SECONDS:
            time.sleep(_LOOK_SECONDS)
        named = store.get("verdict").decode() if store.check(["verdict"]) else "0"
        if named != "all":
            raise CollectiveTimeout(
                f"{where}: Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for "
                f"send/recv from rank 0 {took}; missing: {named}"
            )

    # ------------------------------------------------------------------ messages

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int = 0) -> _MailWork:
        if dst == self.comm.rank:
            raise ValueError(f"rank {dst}: send: to itself")
        return self._mailed(f"send to rank {dst}, tag {tag}", tensors, lambda ready: self._mail.send(ready, dst, tag))

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int = 0) -> _MailWork:
        if src == self.comm.rank:
            raise ValueError(f"rank {src}: recv: from itself")
        return self._mailed(f"recv from rank {src}, tag {tag}", tensors, lambda ready: self._mail.recv(ready, src, tag))

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> _MailWork:
        return self._mailed(
            f"recv from any rank, tag {tag}", tensors, lambda ready: self._mail.recv_anysource(ready, tag)
        )

    def _mailed(self, what: str, tensors: Sequence[Tensor], post: Callable[[list[Tensor]], Any]) -> _MailWork:
        began = time.monotonic()
        try:
            return _MailWork(self, post(list(tensors)), what, list(tensors))
        except RuntimeError as failure:
            raise self._mail_failure(what, failure, time.monotonic() - began) from failure

    def _mail_failure(self, what: str, failure: RuntimeError, waited: float) -> RingredError:
        where, text = f"rank {self.comm.rank}: {what}", str(failure)
        if "Timed out" in text:
            return CollectiveTimeout(f"{where}: not done after {waited:.1f} s")
        if any(word in text for word in ("closed", "closure", "onnection", "reset")):
            return PeerFailed(f"{where}: {text}")
        return UnsupportedTensor(f"{where}: {text}")

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
        self.comm.close()
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


def _operation(opts: Any) -> tuple[ReduceOp, float | None]:
    """The operation, and the factor that each rank's input is multiplied by first (`premul_sum`), or None."""
    if opts is None:
        return ReduceOp.SUM, None
    operation = getattr(opts, "reduceOp", opts)
    kind, factor = operation.__getstate__() if isinstance(operation, dist.ReduceOp) else (operation, None)
    if kind not in _KINDS:
        raise UnsupportedTensor(f"unknown reduce operation {operation!r}; there are {', '.join(map(str, _KINDS))}")
    return _KINDS[kind], factor


def _flattened(lists: Iterable[Sequence[Tensor] | Tensor]) -> list[Tensor]:
    return [tensor for some in lists for tensor in ([some] if isinstance(some, Tensor) else some)]
