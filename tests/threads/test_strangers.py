"""Strangers at every socket that listens: they say nonsense, or nothing, and who belongs there is served all the same.

More of them, and a table: python -m tests.threads.test_strangers 1000000
"""

from __future__ import annotations

import gc
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import NamedTuple

import pytest
import torch
from tabulate import tabulate
from tqdm import tqdm

from ringred.parameter_server.keys import make_keys
from ringred.parameter_server.near import NearLink
from ringred.parameter_server.wire import pack
from ringred.transports import neighbours
from ringred.transports.membership.caller import Connection, Cut, Silent
from ringred.transports.membership.member import Member
from tests.threads.test_membership import PING, SECRET, fuzz
from tests.threads.test_parameter_wire import ADD, memory, messages, nonsense, one_server, one_worker, push

IDLE = 500
AT_ONCE = 50  # frames that a stranger says in one breath


class Door(NamedTuple):
    """A socket that listens, and who belongs there: `serves` returns once that one was served, or raises. `again` says
    whether that can be asked more than once."""

    knock: Callable[[], socket.socket]
    serves: Callable[[], None]
    again: bool = True


@contextmanager
def member_door(unix: bool) -> Iterator[Door]:
    """That at which ranks agree after a failure, and `ringred status` asks."""
    member = Member(SECRET, "127.0.0.1")
    card = member.card if unix else member.card._replace(place="elsewhere")

    def knock() -> socket.socket:
        if unix:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.connect(f"\0{card.name}")
            return link
        return socket.create_connection(("127.0.0.1", card.port), timeout=10)

    def serves() -> None:
        until = time.monotonic() + 8  # who has proved nothing is cut off within seconds, and then there is room
        while True:
            try:
                with Connection(card, SECRET, 5.0) as connection:
                    assert connection.ask(PING, 5.0)["identity"] == member.identity
                return
            except (Cut, Silent):
                assert time.monotonic() < until
                time.sleep(0.1)  # before it tries again

    yield Door(knock, serves)
    member.close()


@contextmanager
def neighbours_door() -> Iterator[Door]:
    """That at which the ranks of a host meet: rank 0 listens, and rank 1 comes late."""
    cards: list[str] = ["", ""]
    met, told, late = threading.Barrier(2), threading.Event(), threading.Event()

    def gather(rank: int, text: str) -> list[str]:
        cards[rank] = text
        met.wait()
        found = list(cards)
        met.wait()
        told.set()
        if rank == 1:
            late.wait()
        return found

    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(neighbours.connect, lambda text, r=r: gather(r, text), r) for r in range(2)]
        told.wait()
        name = cards[0].split(" ")[1]

        def knock() -> socket.socket:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.connect(f"\0ringred-{name}")
            return link

        def serves() -> None:
            assert not both[0].done(), "it waits for rank 1, whoever else comes"
            late.set()
            met = [future.result(60) for future in both]
            for found, reason in met:
                assert found is not None, reason
                found.close()

        yield Door(knock, serves, again=False)


@contextmanager
def server_door(unix: bool) -> Iterator[Door]:
    """That of a parameter server, for workers of its host or of others."""
    keys = make_keys()
    server = one_server(keys)
    worker = one_worker(server, keys)
    worker.declare({"a": torch.zeros(100)}, ADD, [0])
    pushed = 0.0

    def knock() -> socket.socket:
        if unix:
            assert server._near is not None
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            link.connect("\0" + server._near.address.partition(" ")[0])
            return link
        return socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=10)

    def serves() -> None:
        nonlocal pushed
        pushed += 1.0
        assert push(worker, 1.0) == pushed

    yield Door(knock, serves)
    worker.close()
    server.close()


DOORS: dict[str, Callable[[], AbstractContextManager[Door]]] = {
    "ranks after a failure, TCP": lambda: member_door(False),
    "ranks after a failure, Unix": lambda: member_door(True),
    "ranks of a host when they meet, Unix": neighbours_door,
    "parameter server, ZeroMQ": lambda: server_door(False),
    "parameter server, Unix": lambda: server_door(True),
}


def besieged(door: Door, frames: int, idle: int, seed: int = 0) -> int:
    """Opens `idle` connections that say nothing, and says `frames` frames of nonsense on others; how many of them left
    before the other end cut the connection off."""
    draw, said = random.Random(seed), 0
    with ExitStack() as silent:
        for _ in range(idle):
            with suppress(OSError):  # the door may have no room for more
                silent.enter_context(door.knock())
        for turn in tqdm(range(max(1, frames // AT_ONCE)), disable=frames < 100_000):
            with suppress(OSError), door.knock() as link:  # cut off in the middle of it
                link.settimeout(10)
                for _ in range(AT_ONCE):
                    link.send(draw.randbytes(draw.randint(1, 200)), socket.MSG_NOSIGNAL)
                    said += 1
            if turn % 1000 == 0 and door.again:
                door.serves()
        door.serves()
    return said


@pytest.mark.parametrize("silent", [False, True])
def test_half_a_greeting_keeps_no_ranks_from_meeting(silent: bool) -> None:
    """One byte with a descriptor, and then nothing, or the end."""
    with neighbours_door() as door, ExitStack() as held:
        for _ in range(20):
            link = held.enter_context(door.knock())
            socket.send_fds(link, [b"x"], [0])
            if not silent:
                link.close()
        began = time.monotonic()
        door.serves()
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("door", DOORS)
def test_nonsense_and_silence_keep_nobody_out(door: str) -> None:
    with DOORS[door]() as opened:
        besieged(opened, 2000, IDLE)


def near_nonsense(count: int, seed: int = 0) -> int:
    """Sends so many frames of nonsense over a connection that was let in; by how many KiB the memory grew."""
    draw = random.Random(seed)
    server = one_server(None, None)
    worker = one_worker(server, None)
    assert server._near is not None
    link = NearLink(server._near.address, b"hostile")
    try:
        worker.declare({"a": torch.zeros(100)}, ADD, [0])
        whole = [pack(draw.choice([0, 1, 2, 65535]), 5, message) for message in messages()]
        before = grown = 0
        for turn in range(20):
            for _ in range(count // 20):
                frame = nonsense(draw, whole)[0]
                while frame and not link.send(frame):
                    time.sleep(0.0005)  # until the server has read some
                for _ in link.take():
                    pass
            assert push(worker, 1.0) == turn + 1.0
            if turn == 4:
                gc.collect()
                before = memory()
        gc.collect()
        grown = memory() - before
    finally:
        link.close()
        worker.close()
        server.close()
    return grown


def test_nonsense_of_a_worker_that_was_let_in_is_refused() -> None:
    assert near_nonsense(3000) < 30_000


def main(count: int) -> None:
    rows = []
    for name, door in DOORS.items():
        gc.collect()
        before, began = memory(), time.monotonic()
        with door() as opened:
            said = besieged(opened, count, IDLE)
        gc.collect()
        rows.append([name, IDLE, count // AT_ONCE, said, memory() - before, time.monotonic() - began])
    print(tabulate(rows, ["door", "idle", "others", "frames", "memory grew, KiB", "s"], floatfmt=".0f"))
    print(f"messages between ranks: {fuzz(count, 1)} of {count} wrong ones were taken for right")
    print(f"a worker that was let in, by its host's socket: {near_nonsense(count)} KiB more after {count} frames")


if __name__ == "__main__":
    main(int(sys.argv[1]))
