"""Ranks over the point-to-point of torch's Gloo process group, set up from a torch store: no MPI needed.

The first message of a collective from one rank to another travels in a frame: the collective's contract and the
payload's length, then the payload if it is small. The receiver first posts a buffer that fits any frame, compares the
contract and length, and only then posts its other receives from that peer, because Gloo ends the whole process when a
message exceeds the posted buffer.

A Gloo request can be waited for once, a send is done only when it was received, and a wait that times out closes
every connection of the process group. An abort spreads in this way: each rank that sees a closed connection
looks up the reason in the store, and closes its own connections.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as _distributed
from torch import Tensor

from ringred.errors import TransportUnavailable
from ringred.transports.base import UNSETTLED_SECONDS, Counters, Fault, FaultKind
from ringred.transports.stores import Part

dist: Any = _distributed  # torch declares no types for most of what is used here

__all__ = [
    "TorchP2PTransport",
    "bind_address",
    "gloo_group",
]

_HEADER_BYTES = 16  # contract and payload length, as int64
_FRAME_BYTES = 1 << 16
_TAG, _NEVER_SENT = 0, 1
_POOLED = 64
_NEAR_SEGMENT, _FAR_SEGMENT = 1 << 20, 512 << 10  # over loopback Python's part counts, on a network that rounds overlap


def bind_address(hosts: Sequence[object], interface: str | None) -> str | None:
    """The local address for Gloo, given the host of each rank; None leaves it to Gloo, which takes the host's own."""
    # Ranks of one host need no other address than the loopback, and then nobody else can connect.
    return interface or ("127.0.0.1" if len(set(hosts)) == 1 else None)


def gloo_group(store: Any, rank: int, size: int, timeout: float, address: str | None) -> Any:
    """A process group of Gloo's; waits for all ranks. Raises `TransportUnavailable`."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=timeout)
    options._threads = 2
    try:
        if address is None:
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        else:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        return dist.ProcessGroupGloo(store, rank, size, options)
    except RuntimeError as failure:
        raise TransportUnavailable(
            f"rank {rank}: no Gloo connections among {size} ranks within {timeout:g} s: {failure}; "
            "are all ranks up? RINGRED_INTERFACE names the address to use"
        ) from failure


class _Send:
    __slots__ = ("frame", "peer", "source", "works")

    def __init__(self, peer: int, source: Tensor) -> None:
        self.peer, self.source = peer, source
        self.works: list[Any] = []
        self.frame: Tensor | None = None


class _Receive:
    __slots__ = ("frame", "lend", "peer", "target", "view", "work")

    def __init__(self, peer: int, target: Tensor, lend: bool) -> None:
        self.peer, self.target, self.lend = peer, target, lend
        self.view: Tensor | None = None
        self.frame: Tensor | None = None
        self.work: Any = None


class TorchP2PTransport:
    """A Gloo process group of its own. Creating one waits for all `size` ranks, `timeout` seconds at the most.

    `address` is the local address to bind; None leaves it to Gloo, which takes the host's own. `between_hosts` says
    whether a network is on the way.
    """

    name = model = "torch_p2p"
    windows = buffers = False
    player = queue = None

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: float = 300.0,
        address: str | None = None,
        between_hosts: bool = False,
    ) -> None:
        self.rank, self.size = rank, size
        self.counters = Counters()
        self.segment_bytes, self.depth = _FAR_SEGMENT if between_hosts else _NEAR_SEGMENT, 8
        self._store, self._timeout, self._address = store, timeout, address
        # A store serves one call at a time: this transport must not wait behind somebody else's.
        self._board = store.clone() if hasattr(store, "clone") else store
        # A connection to each peer for each direction: Gloo's word that one may send must not wait behind data.
        self._parts = stores = [Part(f"gloo {way}", store) for way in ("down", "up")]
        self._groups = [gloo_group(one, rank, size, timeout, address) for one in stores]
        self._contract = 0
        self._greeted: set[int] = set()
        self._first: dict[int, _Receive] = {}  # peers whose frame of this collective is posted
        self._verified: set[int] = set()  # peers whose frame has come, with the right contract
        self._deferred: dict[int, deque[_Receive]] = defaultdict(deque)
        self._frames: list[Tensor] = []
        self._pool: dict[tuple[torch.dtype, int], list[Tensor]] = defaultdict(list)
        self._in_flight: set[_Send | _Receive] = set()
        self._fault: Fault | None = None
        self._closed = self._leaves = False

    def begin(self, contract: int, turn: int) -> None:
        self._contract = contract
        self._greeted.clear()
        self._first.clear()
        self._verified.clear()

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> _Send:
        nbytes = src.numel() * src.element_size()
        request = _Send(peer, src)
        payload: Tensor | None = src
        if peer not in self._greeted:
            self._greeted.add(peer)
            frame = request.frame = self._frame()
            header = frame[:_HEADER_BYTES].view(torch.int64)
            header[0], header[1] = self._contract, nbytes
            length = _HEADER_BYTES
            if nbytes <= _FRAME_BYTES - _HEADER_BYTES:
                length += nbytes
                frame[_HEADER_BYTES:length].copy_(src.view(torch.uint8))
                payload = None
            self._post(request, lambda: self._groups[peer > self.rank].send([frame[:length]], peer, _TAG))
            self.counters.contract_bytes_sent += _HEADER_BYTES
        if payload is not None:
            self._post(request, lambda: self._groups[peer > self.rank].send([src], peer, _TAG))
        self._in_flight.add(request)
        self.counters.messages_sent += 1
        self.counters.bytes_sent += nbytes
        return request

    def _post(self, request: _Send, post: Any) -> None:
        if self._fault is None:
            try:
                request.works.append(post())
            except RuntimeError as failure:
                self._fault = self._explain(request.peer, failure)

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> _Receive:
        request = _Receive(peer, dst, lend)
        self._in_flight.add(request)
        if peer in self._verified:
            self._post_receive(request)
        elif peer in self._first:
            self._deferred[peer].append(request)
        else:
            self._first[peer] = request
            request.frame = self._frame()
            self._receive_into(request, request.frame)
        return request

    def _post_receive(self, request: _Receive) -> None:
        if request.lend:
            pool = self._pool[request.target.dtype, request.target.numel()]
            request.view = pool.pop() if pool else torch.empty_like(request.target)
        self._receive_into(request, request.target if request.view is None else request.view)

    def _receive_into(self, request: _Receive, memory: Tensor) -> None:
        if self._fault is None:
            try:
                request.work = self._groups[request.peer < self.rank].recv([memory], request.peer, _TAG)
            except RuntimeError as failure:
                self._fault = self._explain(request.peer, failure)

    def wait(self, request: _Send | _Receive, deadline: float) -> Tensor | None:
        if isinstance(request, _Send):
            for work in request.works:
                self._wait_for(work, request.peer, deadline)
            if self._fault is not None:
                raise self._fault
            if request.frame is not None:
                self._frames.append(request.frame)
            self._in_flight.discard(request)
            return None
        if request.peer not in self._verified:
            self._open(request.peer, deadline)
        if request.work is not None:
            self._wait_for(request.work, request.peer, deadline)
        if self._fault is not None:
            raise self._fault
        self._in_flight.discard(request)
        self.counters.messages_received += 1
        self.counters.bytes_received += request.target.numel() * request.target.element_size()
        return request.view if request.lend else None

    def _open(self, peer: int, deadline: float) -> None:
        """Waits for the frame of `peer`, compares contracts, and posts what was held back until then."""
        request = self._first[peer]
        frame = request.frame
        assert frame is not None, "the first receive from a peer has a frame"
        self._wait_for(request.work, peer, deadline)
        request.work = None
        contract, nbytes = frame[:_HEADER_BYTES].view(torch.int64).tolist()
        self.counters.contract_bytes_received += _HEADER_BYTES
        expected = request.target.numel() * request.target.element_size()
        if contract != self._contract or nbytes != expected:
            self._fault = Fault(FaultKind.MISMATCH, peer, f"expected {expected} bytes, got {nbytes}")
            raise self._fault
        self._verified.add(peer)
        if nbytes > _FRAME_BYTES - _HEADER_BYTES:
            self._frames.append(frame)
            request.frame = None
            self._post_receive(request)
        else:
            payload = frame[_HEADER_BYTES : _HEADER_BYTES + nbytes].view(request.target.dtype)
            if request.lend:
                request.view = payload
            else:
                request.target.copy_(payload)
                self._frames.append(frame)
                request.frame = None
        deferred = self._deferred[peer]
        while deferred:
            self._post_receive(deferred.popleft())

    def _wait_for(self, work: Any, peer: int, deadline: float) -> None:
        if self._fault is not None:
            raise self._fault
        # Gloo accepts no timeout of zero. When one passes it closes all connections, as the caller does then anyway.
        left = max(deadline - time.monotonic(), 0.001)
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as failure:
            self._fault = self._explain(peer, failure)
            raise self._fault from None

    def _explain(self, peer: int, failure: RuntimeError) -> Fault:
        if "Timed out waiting" in str(failure):
            return Fault(FaultKind.TIMEOUT, peer, "deadline passed")
        reports = self.reports(0.0)
        for culprit, report in reports.items():
            if culprit != self.rank:
                return Fault(FaultKind.ABORTED, culprit, report)
        return Fault(FaultKind.PEER, peer, "its connection closed")

    def release(self, request: _Receive) -> None:
        if request.frame is not None:
            self._frames.append(request.frame)
        elif request.view is not None:
            self._pool[request.view.dtype, request.view.numel()].append(request.view)
            if len(self._pool) > _POOLED:
                self._pool.clear()

    def _frame(self) -> Tensor:
        return self._frames.pop() if self._frames else torch.empty(_FRAME_BYTES, dtype=torch.uint8)

    def abort(self, report: str) -> None:
        if self._closed:
            return
        with contextlib.suppress(RuntimeError):
            self._board.set(f"abort/{self.rank}", report)
            # set() may return before the store has it; what is read back was stored.
            self._board.get(f"abort/{self.rank}")
        self._hang_up()

    def _hang_up(self) -> None:
        """Closes every connection, by waits that time out. This needs one of each group that is still open."""
        nothing = torch.empty(1, dtype=torch.uint8)
        for group in self._groups:
            for peer in (peer for peer in range(self.size) if peer != self.rank):
                try:
                    group.recv([nothing], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))
                except RuntimeError as failure:
                    if "Timed out" in str(failure):
                        break

    def passed(self, point: object, deadline: float, hurry: threading.Event | None = None) -> None:
        pass  # what is done is done at once

    def settle(self, deadline: float) -> None:
        self._leave()
        until = min(deadline, time.monotonic() + UNSETTLED_SECONDS)
        missing = set(range(self.size)) - {self.rank}
        with contextlib.suppress(RuntimeError):  # the rank that served the store is gone: nothing more will be said
            while missing and time.monotonic() < until:
                for peer in sorted(missing):
                    if self._board.check([f"abort/{peer}"]):
                        raise Fault(FaultKind.ABORTED, peer, self._board.get(f"abort/{peer}").decode(errors="replace"))
                missing -= {peer for peer in missing if self._board.check([f"closing/{peer}"])}
                time.sleep(0.002 if missing else 0.0)

    def _leave(self) -> None:
        """Tells the peers that this rank is closing."""
        if not self._leaves:
            self._leaves = True
            with contextlib.suppress(RuntimeError):
                self._board.set(f"closing/{self.rank}", "")

    def reports(self, timeout: float) -> dict[int, str]:
        deadline = time.monotonic() + timeout
        found: dict[int, str] = {}
        try:
            while not self._closed:
                for peer in range(self.size):
                    if peer not in found and self._board.check([f"abort/{peer}"]):
                        found[peer] = self._board.get(f"abort/{peer}").decode(errors="replace")
                if len(found) == self.size or time.monotonic() >= deadline:
                    break
                time.sleep(0.005)
        except RuntimeError:
            pass  # the rank that served the store is gone; what was found counts
        return found

    def subset(self, members: Sequence[int], key: str) -> TorchP2PTransport:
        store = Part(f"subset/{key}", self._store)
        rank = list(members).index(self.rank)
        transport = TorchP2PTransport(store, rank, len(members), self._timeout, self._address)
        transport.model, transport.segment_bytes = self.model, self.segment_bytes
        return transport

    def close(self) -> None:
        if self._closed:
            return
        self._leave()
        self._closed = True
        if self._in_flight:
            self._hang_up()
        self._in_flight.clear()
        self._deferred.clear()
        self._groups = []
