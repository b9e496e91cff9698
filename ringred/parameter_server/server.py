"""A server: one thread that listens on one address, and hands messages to the machines that it hosts.

ZeroMQ's own threads move the bytes. What the machines decide is in `coordinator.py` and `shard.py`; here are sockets,
clocks and processes: who may talk, who has died, what has to be said again, and what has to be copied first.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from ringred.errors import TransportUnavailable
from ringred.parameter_server import messages as m
from ringred.parameter_server.catalog import WHOLE, Catalog, Placing
from ringred.parameter_server.coordinator import Coordinator, Order
from ringred.parameter_server.door import MOST_SOCKETS, Door
from ringred.parameter_server.keys import Keys
from ringred.parameter_server.near import NearDoor
from ringred.parameter_server.others import Others
from ringred.parameter_server.peers import Peers
from ringred.parameter_server.shard import Answer, Frame, Memory, Result, Shard, Writing, bytes_of
from ringred.parameter_server.shared import WORKERS, Area, SharedMemory, place
from ringred.parameter_server.snapshots import Writer, newest, read_snapshot
from ringred.parameter_server.whole import go_on_from
from ringred.parameter_server.wire import Malformed, pack, unpack

__all__ = ["Server"]

_TICK = 0.5
_EARLY = 4096  # messages that are kept for a server that takes another's place; what is lost is said again
_SERVER = b"server"  # the names under which servers call each other begin so
# What changes a machine, so that its copy has to be changed too; and that which only servers may send.
_CHANGES: tuple[type[Any], ...] = (m.Hello, m.Declare, m.Created, m.Commit, m.Bye, m.Scale, m.Save, m.Collect)
_CHANGES += (m.Attend, m.Create, m.Part, m.State)
_ORDERS = (m.Apply, m.Discard, m.Show, m.Write, m.Left, m.Log)
_Results = Sequence[Result | Order]


class Server:
    """Hosts shard `number` of `shards`, and server 0 the coordinator too; serves on a thread from `start` on.

    `listen` is a ZeroMQ address, `tcp://HOST:*` for any free port, or None for one that this host's processes reach.
    Without `keys` anybody who reaches the address may talk to it: only for addresses of this host.

    With `replicate`, the next server has a copy of each machine of this one. What changes a machine is given to the
    copy, and answered once the copy has it. When this server dies, the copy takes its place (state machine
    replication: Schneider, ACM Computing Surveys 1990, with one backup).

    It goes on from the newest snapshot in the folder `snapshots`, if there is one. `placing` is that of the
    coordinator; where that is, `on_update` is told of each update.
    """

    def __init__(
        self,
        number: int,
        shards: int,
        make_coordinator: Callable[[], Coordinator],
        *,
        replicate: bool = False,
        listen: str | None = None,
        keys: Keys | None = None,
        shared: bool = True,
        snapshots: str | None = None,
        placing: Placing = WHOLE,
        on_update: Callable[[m.Apply], None] | None = None,
    ) -> None:
        self._on_update = on_update
        self.number, self.shards, self.keys, self.snapshots = number, shards, keys, snapshots
        here = place() if shared else ""
        self.area = Area() if here else None
        self._poller = zmq.Poller()
        self._peers = Peers(self._poller, here)
        self._near = NearDoor(self._poller) if here else None
        self._shared = None if self.area is None else SharedMemory(self.area)
        memory = Memory() if self._shared is None else self._shared
        self.machines: dict[int, Coordinator | Shard] = {1 + number: Shard(number, memory, self._peers.memory)}
        if number == 0:
            self.machines[m.COORDINATOR] = make_coordinator()
        self._at_home = frozenset(self.machines)  # those that have a copy: one that was taken over has none
        self._copies: dict[int, Coordinator | Shard] = {}
        self._backup = self._copied = -1
        if replicate and shards > 1:
            self._backup, self._copied = (number + 1) % shards, (number - 1) % shards
            self._copies[1 + self._copied] = Shard(self._copied, Memory(), self._peers.copied)
            if self._copied == 0:
                self._copies[m.COORDINATOR] = make_coordinator()
        self._early: deque[tuple[int, bytes, int, Any, list[Frame]]] = deque(maxlen=_EARLY)
        self._logged = 0
        self._held_back: deque[tuple[int, _Results]] = deque()
        self.refused = 0
        self._context = zmq.Context(1)
        self._context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
        try:
            if snapshots is not None and newest(snapshots) is not None:
                machines = [*self.machines.values(), *self._copies.values()]
                go_on_from(read_snapshot(snapshots), machines, Catalog(shards, placing))
            here_only = f"ipc://@ringred-{secrets.token_hex(16)}"
            self._door = Door(self._context, self._poller, keys, listen or here_only)
        except TransportUnavailable as failure:
            self._let_go()
            raise TransportUnavailable(f"server {number} cannot listen on {failure}") from None
        except BaseException:
            self._let_go()
            raise
        self.address, self._router = self._door.address, self._door.router
        self._others = Others(self._context, self._poller, number, shards, keys, here)
        self._wake, self._woken = socket.socketpair()
        self._writer = Writer(self._is_written)
        self._written: deque[tuple[Writing, str]] = deque()
        self._poller.register(self._woken.fileno(), zmq.POLLIN)
        self._thread = threading.Thread(target=self._serve, name=f"ringred-server-{number}", daemon=True)
        self._stop = False
        self._because, self._others_end = "", False
        self._ended = False
        self._abandoned = math.inf

    def _let_go(self) -> None:
        """Of what other processes could find."""
        self._context.destroy(0)
        if self.area is not None:
            self.area.close()
        if self._near is not None:
            self._near.close()

    def start(self, addresses: Sequence[str]) -> None:
        """Serves, together with the other servers at `addresses`, by number."""
        if self.coordinator is not None or self._backup >= 0:
            self._others.call(addresses)
        self._thread.start()

    @property
    def coordinator(self) -> Coordinator | None:
        """The coordinator, if this server hosts it."""
        found = self.machines.get(m.COORDINATOR)
        return found if isinstance(found, Coordinator) else None

    def done(self, patience: float) -> bool:
        """Whether nobody needs this server any more: all workers have left, or died and did not come back within
        `patience` seconds; or its thread has ended in an exception."""
        if self._ended or self._because or self.coordinator is None:
            return self._ended or bool(self._because)
        if not self.coordinator.abandoned:
            self._abandoned = time.monotonic()
        return self.coordinator.finished or time.monotonic() - self._abandoned > patience

    def close(self, because: str = "", *, others_end: bool = False) -> None:
        """Ends the thread, and everything that this server holds. If there is a reason, workers are told it; if not,
        server 0 ends the other servers too, unless they end by themselves."""
        self._because, self._others_end = because, others_end
        self._stop = True
        self._wake.send(b".")
        if self._thread.is_alive():
            self._thread.join()
        self._writer.close()
        self._peers.close()
        self._others.close(wait=not others_end)
        if self._near is not None:
            self._near.close()
        self._door.close()
        self._context.term()
        self._wake.close()
        self._woken.close()
        if self.area is not None:
            self.area.close()

    # ------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        try:
            self._loop()
        except BaseException as failure:
            self._because = f"raised {type(failure).__name__}: {failure}"
            raise
        finally:
            if self.coordinator is not None and not self._because and not self._others_end:
                self._others.tell_all(m.End())
            if self._because:
                text = m.Failed("PeerFailed", f"server {self.number} at {self.address} is gone: it {self._because}")
                for peer in self._peers:
                    self._send(Answer(peer, 0, text))

    def _loop(self) -> None:
        ticked = time.monotonic()
        while not self._stop:
            ready = dict(self._poller.poll(int(_TICK * 1000)))
            # Looked at before anything is opened that could get the number of what these close.
            gone, answers = list(self._peers.gone(ready)), list(self._others.take(ready))
            self._door.answer(ready)
            if self._near is not None:
                for peer, frame in self._near.take(ready):
                    self._take(peer, frame, ())
            if self._router in ready:
                self._take_all()
            if self._woken.fileno() in ready and not self._stop:
                self._take_written()
            for server, request, message in answers:
                self._take_answer(server, request, message)
            for known, how in gone:
                if self.coordinator is not None and known.worker >= 0:
                    self._change(m.COORDINATOR, b"", 0, m.Left(known.worker, known.life, how), ())
            if time.monotonic() - ticked > _TICK:
                ticked = time.monotonic()
                self._others.tick(ticked)

    def _take_all(self) -> None:
        for _ in range(64):  # then the others have their turn
            try:
                peer, *frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._take(peer.bytes, frames[0].buffer if frames else b"", frames[1:])

    def _take(self, peer: bytes, head: bytes | memoryview, frames: Sequence[zmq.Frame]) -> None:
        try:
            machine, request, message = unpack(head)
        except Malformed:
            self.refused += 1
            return
        self._peers.heard_of(peer)
        body: list[Frame] = [frame.buffer for frame in frames]
        if isinstance(message, (*_ORDERS, m.End)) and not peer.startswith(_SERVER):
            self.refused += 1
        elif isinstance(message, m.Meet):
            self._meet(peer, request, message)
        elif isinstance(message, m.End):
            self._ended = True
        elif isinstance(message, m.Beat):
            self._send(Answer(peer, request, m.Done()))
        elif isinstance(message, m.Log):
            self._copy(peer, message, body)
        elif machine in self.machines:
            if isinstance(message, m.Hello):
                self._greet(message)
            self._change(machine, peer, request, message, body)
        elif machine in self._copies:  # its server has died, which this one will see
            self._early.append((machine, peer, request, message, body))
        else:
            text = f"server {self.number} has no machine {machine} of {1 + self.shards}"
            self._send(Answer(peer, request, m.Failed("PolicyError", text)))

    def _change(self, machine: int, peer: bytes, request: int, message: Any, frames: Sequence[Frame]) -> None:
        """Gives `message` to the machine. What it leads to waits until the copy has it too."""
        results = self.machines[machine].handle(peer, request, message, frames)
        if self._backup < 0 or machine not in self._at_home or not isinstance(message, (*_CHANGES, *_ORDERS)):
            self._deliver(results)
            return
        self._logged += 1
        self._held_back.append((self._logged, results))
        first_open = self.coordinator.first_open if machine == m.COORDINATOR and self.coordinator else ()
        log = [pack(m.COORDINATOR, self._logged, m.Log(machine, self._logged, first_open)), peer]
        log += [pack(machine, request, message), *map(bytes_of, frames)]
        self._others.send(self._backup, log)

    def _deliver(self, results: _Results) -> None:
        """Sends answers to workers and orders to shards. Workers hear first: they have some way to go until they need
        what the shards then do."""
        for result in sorted(results, key=lambda result: isinstance(result, Order)):
            if isinstance(result, Order):
                self._give(result)
            elif isinstance(result, Writing):
                self._writer.write(result, prune=result.number < 0 and result.folder == self.snapshots)
            elif result.peer:
                self._send(result)
            elif isinstance(result.message, m.Written) and self.coordinator is not None:
                self._deliver(self.coordinator.answered(result.message.shard, result.request, result.message.failure))
            elif isinstance(result.message, m.Failed) and result.request:  # to an order
                raise RuntimeError(f"server {self.number} cannot do what it told itself: {result.message.text}")

    def _send(self, answer: Answer) -> None:
        if isinstance(answer.message, m.Released) and self._shared is not None:
            worker = self._peers.sharer(answer.peer)
            if 0 <= worker < WORKERS:
                self._shared.release(worker, answer.message)
                return
        head = pack(0, answer.request, answer.message)
        if not answer.frames and self._near is not None and self._near.send(answer.peer, head):
            return
        frames: list[Any] = [answer.peer, head]
        frames += [bytes_of(frame) for frame in answer.frames]
        with contextlib.suppress(zmq.Again, zmq.ZMQError):  # the worker is gone, or asks again
            self._router.send_multipart(frames, zmq.NOBLOCK, copy=len(frames) <= 2)

    # ------------------------------------------------------------------ orders to shards, and copies

    def _give(self, order: Order) -> None:
        if self._on_update is not None and order.shard == 0 and isinstance(order.message, m.Apply):
            self._on_update(order.message)
        if 1 + order.shard in self.machines:
            self._change(1 + order.shard, b"", order.number, order.message, ())
            if self.coordinator is not None and not isinstance(order.message, m.Write):
                self.coordinator.answered(order.shard, order.number)
        else:
            self._others.order(order)

    def _take_answer(self, server: int, request: int, message: Any) -> None:
        """What another server answered, or that it is gone."""
        if message is None:
            self._server_gone(server)
        elif isinstance(message, m.Logged):
            while self._held_back and self._held_back[0][0] <= message.number:
                self._deliver(self._held_back.popleft()[1])
        elif isinstance(message, m.Failed):
            raise RuntimeError(f"server {server} cannot do what it was told: {message.text}")
        elif isinstance(message, (m.Applied, m.Done, m.Written)) and self.coordinator is not None:
            failure = message.failure if isinstance(message, m.Written) else ""
            self._deliver(self.coordinator.answered(*self._others.answered(request), failure))

    def _copy(self, peer: bytes, log: m.Log, frames: Sequence[Frame]) -> None:
        copy = self._copies.get(log.machine)
        if (
            copy is None or len(frames) < 2
        ):  # this server has taken the other's place: who still speaks as it is refused
            self.refused += 1
            return
        worker, head, *body = frames
        try:
            _, request, message = unpack(bytes_of(head))
        except Malformed:
            self.refused += 1
            return
        copy.handle(bytes(bytes_of(worker)), request, message, body)
        if isinstance(copy, Coordinator) and len(log.answered) == self.shards:
            copy.forget_before(log.answered)
        self._send(Answer(peer, log.number, m.Logged(log.number)))

    def _server_gone(self, server: int) -> None:
        """The next server takes the place of one that died; the one before it goes on without a copy."""
        takes_over = server == self._copied and m.COORDINATOR in self._copies
        if server == self._copied:
            self.machines |= self._copies
            self._copies.clear()
        coordinator = self.coordinator
        if coordinator is not None and takes_over:
            self._deliver(coordinator.taken_over())
            for worker, life in coordinator.lives():
                if (worker, life) not in self._peers.lives:
                    self._change(m.COORDINATOR, b"", 0, m.Left(worker, life, "its process ended"), ())
        elif coordinator is not None:
            waiting = {id(result) for _, results in self._held_back for result in results}
            for order in list(coordinator.orders[server].values()):
                if id(order) not in waiting:  # those are given when the copy has them, after the ones before
                    self._give(order)
        if server == self._copied:
            while self._early:
                self._change(*self._early.popleft())
        if server == self._backup:
            self._backup = -1
            while self._held_back:
                self._deliver(self._held_back.popleft()[1])

    # ------------------------------------------------------------------ snapshots

    def _is_written(self, writing: Writing, failure: str) -> None:
        """On the thread that writes."""
        self._written.append((writing, failure))
        self._wake.send(b".")

    def _take_written(self) -> None:
        """What is on disk, the coordinator and those who asked for it are told."""
        self._woken.recv(4096)
        while self._written:
            writing, failure = self._written.popleft()
            coordinator = self.coordinator
            if writing.peer:
                self._send(Answer(writing.peer, writing.request, m.Written(writing.number, failure)))
            elif coordinator is not None and writing.number >= 0:
                self._deliver(coordinator.answered(writing.number, writing.request, failure))
            elif coordinator is not None:
                self._deliver(coordinator.written(writing.snapshot, failure))

    # ------------------------------------------------------------------ workers that come and go

    def _greet(self, message: m.Hello) -> None:
        """A release that an earlier life of the worker was given is none of this one's."""
        coordinator, number = self.coordinator, message.worker
        if self._shared is None or coordinator is None or not 0 <= number < WORKERS:
            return
        if number not in coordinator.workers or coordinator.workers[number].life != message.life:
            self._shared.forget_release(number)

    def _meet(self, peer: bytes, request: int, message: m.Meet) -> None:
        near, shared = self._peers.meet(peer, message)
        descriptor, head = -1, -1
        near_door = self._near.address if near and self._near is not None else ""
        if shared and self._shared is not None:
            descriptor, head = self._shared.area.descriptor, self._shared.head
        met = m.Met(os.getpid() if near else 0, descriptor, head, self.shards, self._backup, near_door)
        self._send(Answer(peer, request, met))
