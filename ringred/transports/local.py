"""Ranks as threads of one process: the reference transport, strict where real ones are lenient.

Without slots nothing is buffered: a send is done when its receiver has read the sender's own memory. With
`slots=n` each ordered pair has n slots: a send copies into a free one and is done, or queues until one is free.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ringred.transports.base import Counters, Fault, FaultKind

__all__ = ["Hub", "LocalTransport"]


@dataclass(slots=True, eq=False)
class _Message:
    """One message on its way; `data` is the sender's memory, or a slot's once `in_slot`."""

    data: Tensor
    contract: int
    in_slot: bool = False
    taken: bool = False


@dataclass(slots=True, eq=False)
class _Send:
    peer: int
    message: _Message


@dataclass(slots=True, eq=False)
class _Receive:
    peer: int
    index: int
    dst: Tensor
    lend: bool
    contract: int
    message: _Message | None = None


@dataclass(slots=True, eq=False)
class _Channel:
    """One ordered pair: messages that were sent and not yet received, and those that wait for a slot."""

    sent: dict[int, _Message] = field(default_factory=dict)
    count: int = 0
    slots_used: int = 0
    queued: deque[_Message] = field(default_factory=deque)


class Hub:
    """What the ranks of one process share: the channels, and a condition per rank to sleep on."""

    def __init__(self, size: int, slots: int | None = None) -> None:
        self.size, self.slots = size, slots
        self.lock = threading.Lock()
        self.wake = [threading.Condition(self.lock) for _ in range(size)]
        self.channels = {(sender, receiver): _Channel() for sender in range(size) for receiver in range(size)}
        self.reports: dict[int, str] = {}
        self.gone: dict[int, str] = {}
        self.children: dict[str, Hub] = {}

    def transport(self, rank: int) -> LocalTransport:
        return LocalTransport(self, rank)

    def child(self, members: Sequence[int], key: str) -> Hub:
        with self.lock:
            if key not in self.children:
                self.children[key] = Hub(len(members), self.slots)
            return self.children[key]

    def leave(self, rank: int, why: str) -> None:
        """Tells the others that `rank` will take no further part: its transport closed."""
        with self.lock:
            self.gone.setdefault(rank, why)
            self.wake_all()

    def wake_all(self) -> None:
        for condition in self.wake:
            condition.notify_all()


class LocalTransport:
    """One rank's end of a `Hub`."""

    name = model = "local"
    windows = False
    buffers = False
    player = queue = None

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank, self.size = hub, rank, hub.size
        self.counters = Counters()
        self.segment_bytes, self.depth = 1 << 20, 1
        self._contract = 0
        self._posted: dict[int, int] = defaultdict(int)
        self._closed = False

    def begin(self, contract: int, turn: int) -> None:
        self._contract = contract
        with self.hub.lock:
            self._check_aborted()

    def isend(self, peer: int, src: Tensor, put: bool = False, buffered: bool = False) -> _Send:
        message = _Message(src, self._contract)
        with self.hub.lock:
            channel = self.hub.channels[self.rank, peer]
            channel.sent[channel.count] = message
            channel.count += 1
            if self.hub.slots is not None:
                channel.queued.append(message)
                self._fill_slots(channel)
            self.hub.wake[peer].notify_all()
        self.counters.messages_sent += 1
        self.counters.bytes_sent += src.numel() * src.element_size()
        return _Send(peer, message)

    def _fill_slots(self, channel: _Channel) -> bool:
        filled = False
        while channel.queued and channel.slots_used < (self.hub.slots or 0):
            message = channel.queued.popleft()
            message.data = message.data.clone()
            message.in_slot = filled = True
            channel.slots_used += 1
        return filled

    def irecv(self, peer: int, dst: Tensor, lend: bool) -> _Receive:
        index = self._posted[peer]
        self._posted[peer] = index + 1
        return _Receive(peer, index, dst, lend, self._contract)

    def wait(self, request: _Send | _Receive, deadline: float) -> Tensor | None:
        if isinstance(request, _Send):
            message = request.message
            self._sleep_until(lambda: message.in_slot or message.taken, request.peer, deadline)
            return None
        channel = self.hub.channels[request.peer, self.rank]

        def arrived() -> bool:
            message = channel.sent.get(request.index)
            return message is not None and (self.hub.slots is None or message.in_slot)

        self._sleep_until(arrived, request.peer, deadline)
        message = channel.sent[request.index]
        data = message.data
        if message.contract != request.contract or data.numel() != request.dst.numel():
            raise Fault(
                FaultKind.MISMATCH,
                request.peer,
                f"expected {request.dst.numel()} elements, got {data.numel()}",
            )
        self.counters.messages_received += 1
        self.counters.bytes_received += data.numel() * data.element_size()
        if request.lend:
            request.message = message
            return data
        request.dst.copy_(data)
        self._finish(request.peer, request.index)
        return None

    def _sleep_until(self, done: Callable[[], bool], peer: int, deadline: float) -> None:
        hub = self.hub
        with hub.lock:
            while True:
                self._drain()
                if done():  # a message from before an abort is still delivered
                    return
                self._check_aborted()
                if peer in hub.gone:
                    raise Fault(FaultKind.PEER, peer, hub.gone[peer])
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Fault(FaultKind.TIMEOUT, peer, "deadline passed")
                hub.wake[self.rank].wait(left)

    def _check_aborted(self) -> None:
        if self.hub.reports:
            culprit = next(iter(self.hub.reports))
            raise Fault(FaultKind.ABORTED, culprit, self.hub.reports[culprit])

    def _drain(self) -> None:
        """Moves queued messages into slots that became free."""
        for peer in range(self.size if self.hub.slots is not None else 0):
            if self._fill_slots(self.hub.channels[self.rank, peer]):
                self.hub.wake[peer].notify_all()

    def release(self, request: _Receive) -> None:
        self._finish(request.peer, request.index)

    def _finish(self, peer: int, index: int) -> None:
        with self.hub.lock:
            channel = self.hub.channels[peer, self.rank]
            message = channel.sent.pop(index)
            message.taken = True
            if message.in_slot:
                channel.slots_used -= 1
            self.hub.wake[peer].notify_all()

    def passed(self, point: object, deadline: float, hurry: threading.Event | None = None) -> None:
        pass  # what is done is done at once

    def settle(self, deadline: float) -> None:
        for peer in range(self.size):
            channel = self.hub.channels[self.rank, peer]
            self._sleep_until(lambda: not channel.sent, peer, deadline)  # noqa: B023  # called before the next peer's

    def abort(self, report: str) -> None:
        with self.hub.lock:
            self.hub.reports.setdefault(self.rank, report)
            self.hub.wake_all()

    def reports(self, timeout: float) -> dict[int, str]:
        deadline = time.monotonic() + timeout
        hub = self.hub
        with hub.lock:
            while len(hub.reports.keys() | hub.gone.keys()) < self.size:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                hub.wake[self.rank].wait(left)
            return dict(hub.reports)

    def subset(self, members: Sequence[int], key: str) -> LocalTransport:
        return self.hub.child(members, key).transport(list(members).index(self.rank))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.hub.leave(self.rank, "closed its communicator")
