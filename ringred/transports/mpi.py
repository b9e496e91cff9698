"""Ranks as MPI processes: mpi4py over any MPI, buffers only, CPU tensors.

A message's tag holds its collective's number and a hash of its contract and length (22 bits with Open MPI, so that one
mismatch in four million is missed, once). Receives ask for exactly that tag, so that a message of another collective is
never written anywhere. A receive that stays without its message checks what its peer sent instead, and reports that.
A message that nobody received is found when the next collective begins.
(Asking for any tag and comparing later is not safe: a message longer than the buffer
overruns it in some MPI libraries before they report the truncation.)

A wait is `Waitany` on the message and on a receive of a control communicator, which completes when a peer aborts.
MPI has no deadlines: during a wait, a watchdog thread sends tick messages to its own rank, so that the wait checks the
clock and the peers. MPI libraries poll inside `Waitany`; `runtime.config.mpi_environment`,
called before this module is imported, asks them to yield the core.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
import zlib
from array import array
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from ringred.errors import TransportUnavailable
from ringred.transports.base import UNSETTLED_SECONDS, Counters, Fault, FaultKind, Gather, mixed

__all__ = ["MpiTransport", "abort_job", "end_without_others", "gatherer", "library", "world"]

_TICK, _ABORT, _LEAVING, _LEFT = 1, 2, 3, 4
_TICK_SECONDS = 0.1
_REPORT_BYTES = 8192
_TURNS = 256  # a tag holds the turn modulo this
_STALE_TURNS = 32  # a message up to this many turns old is left over; otherwise its sender is ahead
_LONG_SECONDS = 1.0  # longer than any segment takes once its first byte is here
_NATIVE_ELEMENTS = 1 << 30  # MPI counts elements in 31 bits
_64_BITS = (1 << 64) - 1
_POOLED = 64

_DATATYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
}
_OPERATIONS = {
    "sum": MPI.SUM,
    "avg": MPI.SUM,
    "prod": MPI.PROD,
    "min": MPI.MIN,
    "max": MPI.MAX,
    "band": MPI.BAND,
    "bor": MPI.BOR,
    "bxor": MPI.BXOR,
}


def library() -> str:
    """The first line of the MPI library's version text."""
    return str(MPI.Get_library_version()).splitlines()[0].strip("\0 ")


def world() -> Any:
    """The communicator of all ranks of the job."""
    return MPI.COMM_WORLD


def abort_job(code: int) -> None:
    """Ends every process of the job."""
    MPI.COMM_WORLD.Abort(code)


def end_without_others() -> None:
    """From here on this process does not wait for the others in `MPI_Finalize`. All that live must say so, as who waits
    then waits for them as well.

    Open MPI waits there for all ranks of the job, and after a death under `mpirun --enable-recovery` that wait does not
    always end (benchmarks/results/faults.md). Other libraries have no such variable.
    """
    with suppress(ValueError, OSError):
        ctypes.c_bool.in_dll(ctypes.CDLL(MPI.__file__), "ompi_async_mpi_finalize").value = True


def gatherer(comm: Any) -> Gather:
    """Returns a `Gather` among the ranks of `comm`."""

    def gather(text: str) -> list[str]:
        own, lengths = bytearray(text.encode()), array("i", bytes(4 * comm.Get_size()))
        comm.Allgather([array("i", [len(own)]), MPI.INT], [lengths, MPI.INT])
        everyone, ends = bytearray(sum(lengths)), list(itertools.accumulate(lengths))
        comm.Allgatherv([own, MPI.BYTE], [everyone, list(lengths), MPI.BYTE])
        return [everyone[end - length : end].decode() for length, end in zip(lengths, ends, strict=True)]

    return gather


def _memory(tensor: Tensor) -> Any:
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size()), MPI.BYTE]


class _Send:
    __slots__ = ("mpi", "peer", "source")

    def __init__(self, mpi: Any, peer: int, source: Tensor) -> None:
        self.mpi, self.peer, self.source = mpi, peer, source


class _Receive:
    __slots__ = ("lent", "mpi", "nbytes", "peer", "tag", "target")

    def __init__(self, mpi: Any, peer: int, target: Tensor, lent: bool, tag: int, nbytes: int) -> None:
        self.mpi, self.peer, self.target, self.lent, self.tag, self.nbytes = (
            mpi,
            peer,
            target,
            lent,
            tag,
            nbytes,
        )


class MpiTransport:
    """A transport on its own duplicates of `comm`. Constructing one is collective over `comm`."""

    name = model = "mpi"
    windows = False
    buffers = False
    player = queue = None

    def __init__(self, comm: Any) -> None:
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise TransportUnavailable(
                "MPI was started without THREAD_MULTIPLE, which waiting with a deadline needs: leave "
                "mpi4py.rc.thread_level at its default"
            )
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.counters = Counters()
        self.segment_bytes, self.depth = 1 << 19, 8
        self._data, self._control = comm.Dup(), comm.Dup()
        for duplicate in (self._data, self._control):
            duplicate.Set_errhandler(MPI.ERRORS_RETURN)
        # A tag: one bit that marks messages between one pair of ranks, the turn, the hash.
        bits = min(int(comm.Get_attr(MPI.TAG_UB)).bit_length(), 31)
        self._hash_bits = bits - 1 - (_TURNS - 1).bit_length()
        self._pair_bit = 1 << (bits - 1)
        self._contract = self._mixed = self._head = 0
        self._pool: dict[tuple[torch.dtype, int], list[Tensor]] = defaultdict(list)
        self._incoming = bytearray(_REPORT_BYTES)
        self._status = MPI.Status()
        self._wake = self._listen()
        self._notices: list[Any] = []
        self._abandoned: list[Any] = []
        self._reports: dict[int, str] = {}
        self._left: set[int] = set()
        self._leaving: set[int] = set()  # peers that have made their last call, and may still fail
        self._closed = False
        self._waiting_since: float | None = None
        self._active, self._ending = threading.Event(), threading.Event()
        self._watchdog: threading.Thread | None = None

    def begin(self, contract: int, turn: int) -> None:
        self._contract, self._mixed = contract, mixed(contract)
        self._head = self._pair_bit if turn < 0 else (turn % _TURNS) << self._hash_bits
        while self._wake.Test(self._status):
            self._heed()
        self._check_aborted()
        if turn >= 0 and self._data.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, self._status):
            self._check_left_over(turn)

    def _check_left_over(self, turn: int) -> None:
        """Raises if the oldest message that nobody received is of a collective that is over."""
        tag = self._status.Get_tag()
        behind = (turn - (tag >> self._hash_bits)) % _TURNS
        if not tag & self._pair_bit and 0 < behind <= _STALE_TURNS:
            source, nbytes = self._status.Get_source(), self._status.Get_count(MPI.BYTE)
            detail = f"a message of {nbytes} bytes that an earlier collective did not expect"
            raise Fault(FaultKind.MISMATCH, source, detail)

    def _tag(self, nbytes: int) -> int:
        product = (self._mixed + nbytes * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & _64_BITS
        return self._head | product >> (64 - self._hash_bits)

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> _Send:
        nbytes = src.numel() * src.element_size()
        self.counters.messages_sent += 1
        self.counters.bytes_sent += nbytes
        return _Send(self._data.Isend(_memory(src), peer, self._tag(nbytes)), peer, src)

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> _Receive:
        target = dst
        if lend:
            pool = self._pool[dst.dtype, dst.numel()]
            target = pool.pop() if pool else torch.empty_like(dst)
        nbytes = dst.numel() * dst.element_size()
        tag = self._tag(nbytes)
        return _Receive(self._data.Irecv(_memory(target), peer, tag), peer, target, lend, tag, nbytes)

    def wait(self, request: _Send | _Receive, deadline: float) -> Tensor | None:
        if not request.mpi.Test():  # a message from before an abort is still delivered
            if self._reports:
                self._abandon(request)
            self._block(request, deadline)
        if isinstance(request, _Send):
            return None
        self.counters.messages_received += 1
        self.counters.bytes_received += request.nbytes
        return request.target if request.lent else None

    def _block(self, request: _Send | _Receive, deadline: float) -> None:
        self._waiting_since = time.monotonic()
        self._watch()
        try:
            while MPI.Request.Waitany([request.mpi, self._wake], self._status) == 1:
                self._heed()
                if request.mpi.Test():
                    return
                if self._reports:
                    self._abandon(request)
                self._look_at_peer(request)
                if time.monotonic() >= deadline:
                    self._abandoned.append(request)
                    raise Fault(FaultKind.TIMEOUT, request.peer, "deadline passed")
        finally:
            self._waiting_since = None

    def _abandon(self, request: _Send | _Receive) -> None:
        """Gives up `request`, but keeps its memory alive, because MPI may still use it."""
        self._abandoned.append(request)
        self._check_aborted()

    def _check_aborted(self) -> None:
        if self._reports:
            culprit = next(iter(self._reports))
            raise Fault(FaultKind.ABORTED, culprit, self._reports[culprit])

    def _look_at_peer(self, request: _Send | _Receive) -> None:
        """Raises `Fault` if the peer has sent something else than `request` receives, or has left."""
        if isinstance(request, _Receive):
            status = MPI.Status()
            if self._data.Iprobe(request.peer, MPI.ANY_TAG, status) and not request.mpi.Test():
                # Another tag of the same turn may be a later message, while the expected one is still arriving.
                differs = (status.Get_tag() ^ request.tag) >> self._hash_bits
                waited = time.monotonic() - (self._waiting_since or 0.0)
                if differs or (status.Get_tag() != request.tag and waited > _LONG_SECONDS):
                    got = status.Get_count(MPI.BYTE)
                    self._abandoned.append(request)
                    raise Fault(FaultKind.MISMATCH, request.peer, f"expected {request.nbytes} bytes, got {got}")
        if request.peer in self._left and not request.mpi.Test():
            self._abandoned.append(request)
            raise Fault(FaultKind.PEER, request.peer, "closed its communicator")

    def progress(self) -> None:
        """Lets MPI move pending messages, and checks for aborts, while this rank waits on another transport."""
        if self._wake.Test(self._status):
            self._heed()
        self._check_aborted()

    def release(self, request: _Receive) -> None:
        pool = self._pool[request.target.dtype, request.target.numel()]
        pool.append(request.target)
        if len(self._pool) > _POOLED:
            self._pool.clear()

    def _listen(self) -> Any:
        return self._control.Irecv([self._incoming, MPI.BYTE], MPI.ANY_SOURCE, MPI.ANY_TAG)

    def _heed(self) -> None:
        """Handles the control message that completed `_wake`, and posts a receive for the next."""
        source, tag = self._status.Get_source(), self._status.Get_tag()
        if tag == _ABORT:
            length = self._status.Get_count(MPI.BYTE)
            self._reports[source] = self._incoming[:length].decode(errors="replace")
        elif tag == _LEAVING:
            self._leaving.add(source)
        elif tag == _LEFT:
            self._left.add(source)
        self._wake = self._listen()

    def _watch(self) -> None:
        if not self._active.is_set():
            self._active.set()
            if self._watchdog is None:
                self._watchdog = threading.Thread(target=self._tick, name="ringred-mpi-watchdog", daemon=True)
                self._watchdog.start()

    def _tick(self) -> None:
        """Wakes this rank's own wait every so often, so that it looks at the clock. Sleeps while nobody waits."""
        nothing = bytearray(1)
        idle = 0
        while not self._closed:
            if idle > 20:
                self._active.clear()
                self._active.wait()
                idle = 0
            self._ending.wait(_TICK_SECONDS)
            since = self._waiting_since
            if since is None:
                idle += 1
            elif time.monotonic() - since >= _TICK_SECONDS and not self._closed:
                self._control.Send([nothing, MPI.BYTE], self.rank, _TICK)

    def _notify(self, tag: int, text: str) -> None:
        message = bytearray(text.encode()[:_REPORT_BYTES] or b" ")
        for peer in range(self.size):
            if peer != self.rank:
                self._notices.append((self._control.Isend([message, MPI.BYTE], peer, tag), message))

    def passed(self, point: object, deadline: float, hurry: threading.Event | None = None) -> None:
        pass  # what is done is done at once

    def settle(self, deadline: float) -> None:
        self._notify(_LEAVING, "")
        until = min(deadline, time.monotonic() + UNSETTLED_SECONDS)
        while len(self._leaving | self._left | {self.rank}) < self.size and time.monotonic() < until:
            self.progress()
            time.sleep(0.001)

    def abort(self, report: str) -> None:
        if self.rank not in self._reports and not self._closed:
            self._reports[self.rank] = report
            self._notify(_ABORT, report)

    def reports(self, timeout: float) -> dict[int, str]:
        deadline = time.monotonic() + timeout
        while not self._closed and len(self._reports.keys() | self._left) < self.size:
            if self._wake.Test(self._status):
                self._heed()
            elif time.monotonic() >= deadline:
                break
            else:
                time.sleep(0.001)
        return dict(self._reports)

    def can_all_reduce(self, dtype: torch.dtype) -> bool:
        """Whether MPI itself reduces this dtype."""
        return dtype in _DATATYPES

    def native_all_reduce(self, tensor: Tensor, op: str, deadline: float) -> None:
        """MPI's own all-reduce, in place. A small all-reduce before it compares the contracts."""
        contracts = torch.tensor([self._contract, -self._contract])
        self._all_reduce(contracts, MPI.MIN, deadline)
        least, greatest = contracts[0].item(), -contracts[1].item()
        if least != greatest:
            raise Fault(FaultKind.MISMATCH, -1, "contracts differ")
        for lo in range(0, tensor.numel(), _NATIVE_ELEMENTS):
            self._all_reduce(tensor[lo : lo + _NATIVE_ELEMENTS], _OPERATIONS[op], deadline)
        if op == "avg":
            tensor.div_(self.size)

    def _all_reduce(self, tensor: Tensor, operation: Any, deadline: float) -> None:
        memory = [_memory(tensor)[0], tensor.numel(), _DATATYPES[tensor.dtype]]
        request = _Send(self._data.Iallreduce(MPI.IN_PLACE, memory, operation), -1, tensor)
        self.wait(request, deadline)

    def subset(self, members: Sequence[int], key: str) -> MpiTransport:
        group = self._data.Get_group().Incl(list(members))
        comm = self._data.Create_group(group, zlib.crc32(key.encode()) & (self._pair_bit - 1))
        transport = MpiTransport(comm)
        transport.model, transport.segment_bytes = self.model, self.segment_bytes
        comm.Free()
        group.Free()
        return transport

    def close(self) -> None:
        if self._closed:
            return
        if not self._reports:
            self._notify(_LEFT, "")
        self._closed = True
        self._ending.set()
        self._active.set()
        if self._watchdog is not None:
            self._watchdog.join()
        for request in [self._wake, *(r.mpi for r in self._abandoned if isinstance(r, _Receive))]:
            if request != MPI.REQUEST_NULL:
                request.Cancel()
                request.Wait()
