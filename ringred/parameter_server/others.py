"""A server's links to the other servers: orders that are given until they are answered, and who of them has died."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import zmq

from ringred.parameter_server import messages as m
from ringred.parameter_server.coordinator import Order
from ringred.parameter_server.door import secured
from ringred.parameter_server.keys import Keys
from ringred.parameter_server.pulse import BEAT, Pulse
from ringred.parameter_server.wire import pack, unpack

__all__ = ["Others"]

_AGAIN = 2.0  # seconds after which an order that was not answered is given again


class Others:
    """Links from server `number` to those at the addresses that `call` is given; sockets are watched by `poller`."""

    def __init__(
        self,
        context: zmq.Context[Any],
        poller: zmq.Poller,
        number: int,
        shards: int,
        keys: Keys | None,
        place: str,
    ) -> None:
        self._context, self._poller, self._keys, self._place = context, poller, keys, place
        self._number, self._shards = number, shards
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self._processes: dict[int, int] = {}
        self._pulses: dict[int, Pulse] = {}
        self._given: dict[tuple[int, int], tuple[float, Order]] = {}
        self._beaten = 0.0
        self.dead: set[int] = set()

    def call(self, addresses: Sequence[str]) -> None:
        """Connects to all of them, and asks where they are."""
        for server, address in enumerate(addresses):
            if server == self._number:
                continue
            link = secured(self._context.socket(zmq.DEALER), self._keys)
            name = f"server{self._number}".encode()
            link.set(zmq.ROUTING_ID, name)
            link.set(zmq.SNDHWM, 0)  # servers that wait for each other to take something would wait for ever
            link.connect(address)
            self._links[server] = link
            self._pulses[server] = Pulse(self._context, self._poller, address, name, self._keys)
            self._poller.register(link, zmq.POLLIN)
            self.send(server, [pack(0, 0, m.Meet(-1, self._number, os.getpid(), -1, self._place))])

    def send(self, server: int, frames: Sequence[Any]) -> None:
        """Sends a message; it waits where the other does not take it yet."""
        if server in self._links:
            self._links[server].send_multipart(frames, copy=len(frames) == 1)

    def tell_all(self, message: Any) -> None:
        """Sends what is not answered."""
        for server, link in self._links.items():
            with contextlib.suppress(zmq.Again):
                link.send(pack(1 + server, 0, message), zmq.NOBLOCK)

    def order(self, order: Order) -> None:
        """Gives an order to the server that has the shard: its own, or the one after it if that is dead."""
        server = order.shard if order.shard not in self.dead else (order.shard + 1) % self._shards
        self._given[order.shard, order.number] = (time.monotonic(), order)
        if server in self._links:
            with contextlib.suppress(zmq.Again):
                request = order.number * self._shards + order.shard
                self._links[server].send(pack(1 + order.shard, request, order.message), zmq.NOBLOCK)

    def answered(self, request: int) -> tuple[int, int]:
        """The shard, and the number of the order, that an answer to `request` is for."""
        number, shard = divmod(request, self._shards)
        self._given.pop((shard, number), None)
        return shard, number

    def take(self, ready: Mapping[Any, int]) -> Iterator[tuple[int, int, Any]]:
        """(server, request, message) of what came; the message is None if the server is gone."""
        ended = [server for server, process in self._processes.items() if process in ready]
        for server, link in list(self._links.items()):
            if link in ready or self._pulses[server].link in ready:
                self._pulses[server].take()
                with contextlib.suppress(zmq.Again):
                    while server not in self.dead:
                        _, request, message = unpack(link.recv(zmq.NOBLOCK))
                        if isinstance(message, m.Met):
                            self._watch(server, message)
                        elif isinstance(message, m.Failed) and request == 0:
                            yield from self._lost(server)
                        else:
                            yield server, request, message
        for server in ended:
            yield from self._lost(server)
        for server in [server for server, pulse in self._pulses.items() if pulse.silent]:
            if server not in self._processes:  # whose process tells by itself
                yield from self._lost(server)

    def _watch(self, server: int, met: m.Met) -> None:
        if met.pid and met.pid != os.getpid() and server not in self._processes:
            with contextlib.suppress(OSError):
                self._processes[server] = os.pidfd_open(met.pid)
                self._poller.register(self._processes[server], select.POLLIN)

    def _lost(self, server: int) -> Iterator[tuple[int, int, Any]]:
        if server in self.dead:
            return
        self.dead.add(server)
        link = self._links.pop(server)
        self._poller.unregister(link)
        link.close(0)
        self._pulses.pop(server).close()
        process = self._processes.pop(server, -1)
        if process >= 0:
            self._poller.unregister(process)
            os.close(process)
        yield server, 0, None

    def tick(self, now: float) -> None:
        """Says again what was not answered, and that this server lives."""
        for given, order in list(self._given.values()):
            if now - given > _AGAIN and not isinstance(order.message, m.Write):  # which may well take longer
                self.order(order)
        if now - self._beaten > BEAT:
            self._beaten = now
            for pulse in self._pulses.values():
                pulse.beat(m.Beat(-1, self._number))

    def close(self, *, wait: bool) -> None:
        """Closes the links; with `wait`, once what they have to send has left."""
        for link in self._links.values():
            link.close(None if wait else 0)
        for pulse in self._pulses.values():
            pulse.close()
        self._pulses.clear()
        for process in self._processes.values():
            os.close(process)
        self._links.clear()
        self._processes.clear()
