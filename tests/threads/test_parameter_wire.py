"""Strangers at a parameter server's door, and frames that are no messages: refused, and the server goes on.

More frames: python -m tests.threads.test_parameter_wire 100000
"""

from __future__ import annotations

import gc
import os
import random
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from ringred.errors import CollectiveTimeout, TransportUnavailable
from ringred.parameter_server import messages as m
from ringred.parameter_server.coordinator import Coordinator
from ringred.parameter_server.door import secured
from ringred.parameter_server.keys import Keys, load_keys, make_keys, save_keys
from ringred.parameter_server.policies import Gradient, KAsync
from ringred.parameter_server.rules import Rule
from ringred.parameter_server.server import Server
from ringred.parameter_server.shared import place
from ringred.parameter_server.wire import Malformed, pack, unpack
from ringred.parameter_server.worker import Worker

ADD = Rule("add", [{}])


def one_server(keys: Keys | None, listen: str | None = "tcp://127.0.0.1:*") -> Server:
    server = Server(0, 1, lambda: Coordinator(KAsync(1), 1, 1), listen=listen, keys=keys)
    server.start([server.address])
    return server


def one_worker(server: Server, keys: Keys | None, **options: Any) -> Worker:
    return Worker(0, [server.address], keys=keys, timeout=20, **options)


def push(worker: Worker, value: float) -> float:
    """Adds `value`, and returns what is there then."""
    gradients = worker.gradients()
    worker.begin()
    worker.push(gradients, {"a": torch.full((100,), value)})
    worker.commit(gradients)
    out = torch.empty(100)
    worker.version = worker.pull(worker.targets({"a": out}), worker.version + 1)
    assert bool((out == out[0]).all())
    return out[0].item()


def link_to(server: Server, keys: Keys | None, name: bytes) -> zmq.Socket[bytes]:
    link = secured(zmq.Context.instance().socket(zmq.DEALER), keys)
    link.set(zmq.ROUTING_ID, name)
    link.set(zmq.LINGER, 5000)
    link.connect(server.address)
    return link


def messages() -> list[Any]:
    """One of each kind, some of them dangerous."""
    return [
        m.Hello(7, 1),
        m.Hello(0, 99),
        m.Declare(0, '{"rule": {"kind": "__class__", "groups": [], "schedule": null}, "tensors": []}'),
        m.Declare(0, '{"tensors": [["b", [-1], "float32", 0, ""]]}'),
        m.Declare(0, "[" * 5000),
        m.Commit(0, 1, 5, 0),
        m.Commit(3, 3, 3, 3),
        m.Await(0, 1, 0),
        m.Bye(0, 12345, 0, ""),
        m.Beat(0, 1),
        m.Create('{"rule": {"kind": "SGD", "groups": [{"lr": 1}], "schedule": null}, "pieces": []}'),
        m.Create("{}"),
        m.Part(0, 1, 10**9, 77, (0,), ()),
        m.Part(0, 1, 10**9, 0, (0,), (1 << 60,)),
        m.Part(0, 1, 10**9, 0, (0, 1, 2, -5), ()),
        m.Pull(1 << 60, (99,)),
        m.Where((1 << 50,)),
        m.Apply(3, 1.0, (Gradient(0, 1, 0),), (1.0,), ()),
        m.State("{}"),
        m.State('{"version": 0}'),
        m.State('{"version": 7, "rate": 1.0, "policy": "", "rule": null, "figures": {}, "tensors": []}'),
        m.State('{"version": 7, "rule": null, "pieces": [[0, [100], "float64", 0]], "kept": [], "stepper": {}}'),
        m.Save("/dev/null/nowhere"),
        m.Meet(0, 1, 1 << 40, 5, place()),
        m.Meet(0, 1, os.getpid(), 0, place()),
        m.Declare(
            0, '{"rule": {"kind": "add", "groups": [{}], "schedule": null}, "tensors": [["z", [1], "\\ud800", 0, ""]]}'
        ),
        m.Attend(0, 4242),
        m.Collect((1, 2, 3)),
        m.Collect((1,)),
        m.Show(0, "w0/1", 1),
        m.Write(0, "/dev/null/nowhere", "s"),
        m.Written(0, "x"),
        m.Discard(()),
        m.Values(3),
        m.Failed("x", "y"),
    ]


def hostile_frames(count: int, seed: int = 0) -> int:
    """Sends `count` frames of nonsense to a server that a worker uses; returns by how many KiB its memory grew."""
    generator = random.Random(seed)
    keys = make_keys()
    server = one_server(keys)
    worker = one_worker(server, keys)
    link = link_to(server, keys, b"hostile")
    try:
        worker.declare({"a": torch.zeros(100)}, ADD, [0])
        whole = [pack(generator.choice([0, 1, 2, 65535]), 5, message) for message in messages()]
        pushed, grown = 0.0, 0
        rounds = 20
        for turn in range(rounds):
            for _ in range(count // rounds):
                link.send_multipart(nonsense(generator, whole))
                while link.poll(0):
                    link.recv_multipart()
            pushed += 1.0
            assert push(worker, 1.0) == pushed, "the server goes on, and nothing of the nonsense counts"
            if turn == 4:
                gc.collect()
                grown = -memory()
        gc.collect()
        return grown + memory()
    finally:
        link.close()
        worker.close()
        server.close()


def nonsense(generator: random.Random, whole: list[bytes]) -> list[bytes]:
    kind = generator.randrange(5)
    if kind == 0:
        return [generator.randbytes(generator.randrange(200))]
    frame = bytearray(generator.choice(whole))
    if kind == 1:
        return [bytes(frame[: generator.randrange(len(frame))])]
    if kind == 2:
        for _ in range(3):
            frame[generator.randrange(16, len(frame))] = generator.randrange(256) if len(frame) > 16 else 0
        return [bytes(frame), generator.randbytes(generator.randrange(64))]
    if kind == 3:
        return [bytes(frame) + generator.randbytes(8)]
    return [bytes(frame), *[generator.randbytes(400)] * generator.randrange(3)]


def memory() -> int:
    """Resident KiB of now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def test_frames_of_nonsense_are_refused_and_the_server_goes_on() -> None:
    assert hostile_frames(3000) < 30_000


def test_wrong_and_absent_keys_are_refused_before_anything_is_parsed() -> None:
    keys = make_keys()
    server = one_server(keys)
    worker = one_worker(server, keys)
    try:
        worker.declare({"a": torch.zeros(100)}, ADD, [0])
        others = make_keys()
        wrong = [
            others,
            keys._replace(worker_public=others.worker_public, worker_secret=others.worker_secret),
            keys._replace(server_public=others.server_public),
            None,
        ]
        for stranger in wrong:
            with pytest.raises(CollectiveTimeout, match=f"server 0 at {server.address} did not answer Meet within"):
                Worker(0, [server.address], keys=stranger, timeout=0.3)
        host, port = server.address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
        assert server.refused == 0, "none of it was looked at"
        assert push(worker, 2.0) == 2.0
    finally:
        worker.close()
        server.close()


def test_replayed_frames_change_nothing() -> None:
    """A push that is said again, in whole or in parts, counts once."""
    keys = make_keys()
    server = one_server(keys)
    worker = one_worker(server, keys, shared=False)
    sent: list[tuple[int, Any, Any]] = []
    ask = worker.connection.ask

    def recording(machine: int, message: Any, frames: Any = (), **more: Any) -> Any:
        sent.append((machine, message, frames))
        return ask(machine, message, frames, **more)

    try:
        worker.declare({"a": torch.zeros(100)}, ADD, [0])
        worker.connection.ask = recording  # type: ignore[method-assign]
        for value in range(1, 6):
            assert push(worker, 1.0) == value
            for again in random.Random(value).choices(
                [entry for entry in sent if not isinstance(entry[1], m.Pull)], k=9
            ):
                worker.connection.wait([ask(*again)])
        assert server.coordinator is not None
        assert server.coordinator.policy.version == 5
    finally:
        worker.close()
        server.close()


def test_without_keys_a_server_listens_on_this_host_only() -> None:
    with pytest.raises(TransportUnavailable, match="other hosts reach it, and there are no keys"):
        one_server(None, "tcp://0.0.0.0:*")
    server = one_server(None, None)
    worker = one_worker(server, None)
    worker.close()
    server.close()


def test_an_address_in_use_is_named() -> None:
    server = one_server(None)
    with pytest.raises(
        TransportUnavailable, match=f"server 0 cannot listen on {server.address}: Address already in use"
    ):
        one_server(None, server.address)
    server.close()


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    keys, path = make_keys(), tmp_path / "keys"
    save_keys(keys, path)
    assert load_keys(path) == keys
    assert keys.server_secret not in repr(keys)
    with pytest.raises(FileExistsError):
        save_keys(keys, path)
    path.chmod(0o644)
    with pytest.raises(TransportUnavailable, match="other users may read these keys; chmod 600"):
        load_keys(path)
    for text in ("", "[]", '["a", "b", "c", "d"]', make_keys()._replace(worker_public=keys.worker_public).as_text()):
        with pytest.raises(TransportUnavailable, match="not the keys of a job"):
            Keys.from_text(text)


def test_messages_survive_the_wire_and_nothing_else_does() -> None:
    for message in messages():
        frame = pack(3, 17, message)
        assert unpack(frame) == (3, 17, message)
        for cut in range(len(frame)):
            with pytest.raises(Malformed):
                unpack(frame[:cut])
        with pytest.raises(Malformed):
            unpack(frame + b"\0")


if __name__ == "__main__":
    print(f"{sys.argv[1]} frames: memory grew by {hostile_frames(int(sys.argv[1]))} KiB")
