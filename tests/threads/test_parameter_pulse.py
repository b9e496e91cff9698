"""Servers of other places: data on its way is neither a loss nor silence, and a lost connection is one at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import zmq

from ringred.errors import CollectiveTimeout, PeerFailed
from ringred.parameter_server import connection, others, peers, pulse
from ringred.parameter_server import messages as m
from ringred.parameter_server.connection import Connection
from ringred.parameter_server.coordinator import Coordinator
from ringred.parameter_server.keys import make_keys
from ringred.parameter_server.policies import KAsync
from ringred.parameter_server.pulse import whose
from ringred.parameter_server.rules import Rule
from ringred.parameter_server.server import Server
from ringred.parameter_server.wire import pack, unpack
from ringred.parameter_server.worker import Worker

ASKED = m.Await(0, 1, 5)


class Far:
    """A server of another place that answers who meets it, and pulses while `beats`; other requests it counts, and
    answers once `answers`."""

    def __init__(self) -> None:
        self.beats, self.answers, self.stop = True, False, False
        self.asked: Counter[int] = Counter()
        self.last_words = ""  # said where it is asked something
        self.address = "tcp://127.0.0.1:*"
        self._context = zmq.Context()
        self._listening = threading.Event()
        self.start()

    def start(self) -> None:
        """Listens, where it did before if it did."""
        self.stop = False
        self._listening.clear()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        assert self._listening.wait(10)

    def end(self) -> None:
        """Cuts all connections."""
        self.stop = True
        self._thread.join()

    def close(self) -> None:
        self.end()
        self._context.term()

    def _serve(self) -> None:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.LINGER, 0)
        deadline = time.monotonic() + 10
        while True:
            try:
                router.bind(self.address)
                break
            except zmq.ZMQError:  # the port is free once the last connection's end has come
                assert time.monotonic() < deadline
                time.sleep(0.01)  # nothing tells when
        self.address = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._listening.set()
        while not self.stop:
            if router.poll(10):
                self._take(router)
        router.close()

    def _take(self, router: zmq.Socket[bytes]) -> None:
        name, head, *_ = router.recv_multipart()
        _, number, message = unpack(head)
        if isinstance(message, m.Meet):
            router.send_multipart([name, pack(0, number, m.Met(0, -1, -1, 1, -1, ""))])
        elif whose(name) != name:
            if self.beats:
                router.send_multipart([name, pack(0, number, m.Done())])
        else:
            self.asked[number] += 1
            if self.last_words:
                time.sleep(0.2)  # `wait` is to know of the end before, and nothing tells when it does
                router.send_multipart([name, pack(0, 0, m.Failed("PeerFailed", self.last_words))])
            if self.answers:
                router.send_multipart([name, pack(0, number, m.Done())])


@contextmanager
def far(monkeypatch: pytest.MonkeyPatch, silence: float) -> Iterator[tuple[Far, Connection]]:
    """A server and a connection to it, where beats go ten times in a `silence`."""
    monkeypatch.setattr(pulse, "SILENCE", silence)
    monkeypatch.setattr(peers, "SILENCE", silence)
    monkeypatch.setattr(connection, "BEAT", silence / 10)
    server = Far()
    try:
        ask = Connection([server.address], 0, lambda message: None, timeout=10, shared=False)
        try:
            yield server, ask
        finally:
            ask.close()
    finally:
        server.close()


def test_a_server_that_is_slow_to_answer_is_not_asked_again_and_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, what had no answer after two seconds was sent again."""
    with far(monkeypatch, 2.0) as (server, ask):
        slow = ask.ask(1, ASKED, [b"gradients"])
        with pytest.raises(CollectiveTimeout, match="did not answer Await within"):
            ask.wait([slow], 3.0)
        assert server.asked[slow.number] == 1


def test_what_a_lost_connection_may_have_lost_is_sent_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with far(monkeypatch, 10.0) as (server, ask):
        asked = ask.ask(1, ASKED, [b"gradients"])
        deadline = time.monotonic() + 10
        while not server.asked[asked.number] and time.monotonic() < deadline:
            ask.poll(0.01)
        server.end()
        server.answers = True
        server.start()
        began = time.monotonic()
        ask.wait([asked])
        assert server.asked[asked.number] >= 2
        assert time.monotonic() - began < 5, "twenty seconds later it would have been sent again anyway"


def test_a_server_whose_pulse_stops_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with far(monkeypatch, 2.0) as (server, ask):
        server.beats = False
        with pytest.raises(
            PeerFailed, match=r"server 0 at tcp://127.0.0.1:\d+ is gone: its process ended, or it was not"
        ):
            ask.wait([ask.ask(1, ASKED)])


def test_what_a_server_said_last_may_come_after_the_news_that_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with far(monkeypatch, 10.0) as (server, ask):
        server.last_words = "server 0 is gone: it was ended"
        asked = ask.ask(1, ASKED)
        ask._server_ended(0)
        with pytest.raises(PeerFailed, match="server 0 is gone: it was ended"):
            ask.wait([asked])


def test_a_worker_of_another_place_that_computes_for_long_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing but that it lives, to servers that say the same to each other."""
    monkeypatch.setattr(pulse, "SILENCE", 2.0)
    monkeypatch.setattr(peers, "SILENCE", 2.0)
    monkeypatch.setattr(connection, "BEAT", 0.2)
    monkeypatch.setattr(others, "BEAT", 0.2)
    keys = make_keys()
    servers = [
        Server(number, 2, lambda: Coordinator(KAsync(1), 1, 2), listen="tcp://127.0.0.1:*", keys=keys)
        for number in range(2)
    ]
    for server in servers:
        server.start([each.address for each in servers])
    addresses = [server.address for server in servers]
    worker = Worker(0, addresses, keys=keys, timeout=10, shared=False)
    try:
        worker.declare({"a": torch.zeros(100), "b": torch.zeros(100)}, Rule("add", [{}]), [0, 0])
        time.sleep(3)  # computes, for longer than anybody may be silent
        gradients = worker.gradients()
        worker.begin()
        worker.push(gradients, {"a": torch.ones(100), "b": torch.ones(100)})
        worker.commit(gradients)
        assert not any(each._others.dead for each in servers)
    finally:
        worker.close()
        for server in servers:
            server.close()
