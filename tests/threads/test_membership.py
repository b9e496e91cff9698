"""The messages beside the data: who is listened to, and what is not."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from ringred.errors import PeerFailed
from ringred.transports.membership.agree import agree
from ringred.transports.membership.caller import Connection, Cut, Gone, Silent
from ringred.transports.membership.member import Member
from ringred.transports.membership.view import View
from ringred.transports.membership.wire import (
    GREETING_BYTES,
    HELLO_BYTES,
    Malformed,
    Session,
    answer_greeting,
    answer_hello,
    greet,
)
from ringred.transports.stores import told

ROOT = Path(__file__).parents[2]
SECRET = b"the secret of this job, 32 bytes"
PING = {"do": "ping", "lineage": "world", "generation": 0}


@pytest.fixture
def member() -> Iterator[Member]:
    made = Member(SECRET, "127.0.0.1")
    yield made
    made.close()


def by_tcp(member: Member) -> socket.socket:
    return socket.create_connection(("127.0.0.1", member.card.port), timeout=10)


def is_answered(member: Member) -> bool:
    with Connection(member.card, SECRET, 5.0) as connection:
        return bool(connection.ask(PING, 5.0)["identity"] == member.identity)


def test_who_knows_the_secret_is_answered(member: Member) -> None:
    for card in (member.card, member.card._replace(place="elsewhere")):  # by its Unix socket, and by TCP
        with Connection(card, SECRET, 5.0) as connection:
            for _ in range(3):
                assert connection.ask(PING, 5.0)["identity"] == member.identity


@pytest.mark.parametrize("secret", [b"another secret", b"", None])
def test_a_wrong_or_absent_secret_is_cut_off(secret: bytes | None, member: Member) -> None:
    with pytest.raises((Cut, Malformed)):
        Connection(member.card._replace(place="elsewhere"), secret, 5.0)
    assert is_answered(member)


def test_who_listens_must_know_the_secret_too() -> None:
    """Another process at the address of a member learns nothing, and is believed nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        heard = []

        def pretend() -> None:
            connection, _ = listener.accept()
            connection.sendall(greet())
            heard.append(connection.recv(4096))
            connection.sendall(os.urandom(32))
            connection.close()

        thread = threading.Thread(target=pretend)
        thread.start()
        from ringred.transports.membership.card import Card

        with pytest.raises(Malformed, match="does not know the job's secret"):
            Connection(Card("x", 1, "elsewhere", "", "127.0.0.1", port), SECRET, 5.0)
        thread.join()
    assert SECRET not in heard[0]


def test_a_conversation_that_was_overheard_cannot_be_repeated(member: Member) -> None:
    with by_tcp(member) as first:
        greeting = first.recv(GREETING_BYTES)
        hello, proof, session = answer_greeting(SECRET, greeting)
        first.sendall(hello)
        assert first.recv(32) == proof
        asked = session.seal(PING)
        first.sendall(asked)
        assert first.recv(4096)
        first.sendall(asked)  # the same once more, in the same connection
        assert first.recv(4096) == b""
    with by_tcp(member) as second:
        second.recv(GREETING_BYTES)
        second.sendall(hello + asked)  # all of it in another one
        assert second.recv(4096) == b""


def test_a_proof_that_was_made_for_the_other_end_is_no_proof() -> None:
    greeting = greet()
    hello, proof, _ = answer_greeting(SECRET, greeting)
    assert len(hello) == HELLO_BYTES
    answer, _ = answer_hello(SECRET, greeting, hello, same_user=False)
    assert answer == proof
    with pytest.raises(Malformed, match="does not know the job's secret"):
        answer_hello(SECRET, greeting, hello[: -len(proof)] + proof, same_user=False)
    with pytest.raises(Malformed, match="no greeting"):
        answer_hello(SECRET, greeting, hello.replace(b"RRM1S", b"RRM1U"), same_user=False)


def fuzz(count: int, seed: int) -> int:
    """Opens `count` frames, most of which are wrong, and returns how many were taken for right."""
    chosen = random.Random(seed)
    taken = 0
    greeting = greet()
    hello, _, _ = answer_greeting(SECRET, greeting)
    for _ in range(count):
        _, session = answer_hello(SECRET, greeting, hello, same_user=False)
        _, _, sender = answer_greeting(SECRET, greeting)
        kind = chosen.randrange(4)
        frame = bytearray(sender.seal({"do": "ping", "x": chosen.random()}) if kind else chosen.randbytes(40))
        for _ in range(chosen.randint(1, 4) if kind < 3 else 0):
            frame[chosen.randrange(len(frame))] ^= 1 << chosen.randrange(8)
        head, payload = bytes(frame[:20]), bytes(frame[20:])
        try:
            Session.length(head)
            session.opened(head, payload)
            taken += 1
        except Malformed:
            pass
    return taken


def test_frames_that_were_not_sent_are_not_taken() -> None:
    assert fuzz(3000, seed=1) == 0


def test_garbage_is_cut_off_and_the_next_is_answered(member: Member) -> None:
    chosen = random.Random(4)
    for _ in range(200):
        with by_tcp(member) as connection:
            connection.sendall(chosen.randbytes(chosen.randint(1, 300)))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert is_answered(member)


def test_many_idle_connections_keep_nobody_out(member: Member) -> None:
    idle = [by_tcp(member) for _ in range(500)]
    began = time.monotonic()
    try:
        while True:  # those who proved nothing are cut off within seconds, and then there is room
            try:
                assert is_answered(member)
                break
            except (Cut, Silent):
                assert time.monotonic() - began < 8
                time.sleep(0.1)
    finally:
        for connection in idle:
            connection.close()


def test_nobody_listens_where_a_member_has_closed() -> None:
    made = Member(SECRET)
    made.close()
    with pytest.raises(Gone):
        Connection(made.card, SECRET, 5.0)


def test_a_member_of_one_host_listens_at_no_port() -> None:
    made = Member(SECRET)
    try:
        assert made.card.port == 0
    finally:
        made.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_user_is_not_told_anything(member: Member) -> None:
    program = (
        "import os, sys\n"
        "from ringred.transports.membership.caller import Connection\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "Connection(sys.argv[1], None, 5.0).ask({'do': 'describe'}, 5.0)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, member.card.name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode != 0
    assert "Cut" in found.stderr or "Malformed" in found.stderr


def test_a_forked_child_is_no_member(member: Member) -> None:
    """Its copies of the sockets are closed: when the parent ends, nobody listens there any more."""
    doors = [str(door.fileno()) for door in member._listener.doors]
    assert all(_is_listening(door) for door in doors)
    process = os.fork()
    if not process:
        os._exit(sum(_is_listening(door) for door in doors))
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert is_answered(member)


def _is_listening(name: str) -> bool:
    try:
        copy = socket.socket(fileno=os.dup(int(name)))
    except OSError:
        return False
    with copy:
        return bool(copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def test_of_two_deciders_one_after_the_other_the_first_view_counts() -> None:
    """One left word of its view and ended before others had it: they get that view, and not another of its number."""
    from ringred.transports.membership.rendezvous import Rendezvous

    keeper, first, second = (Member(SECRET) for _ in range(3))
    try:
        rendezvous = Rendezvous.kept_by(keeper)
        start = View("world", 0, (first.card, second.card), {})
        assert rendezvous.tell(start) == start
        decided = View("world", 1, (first.card, second.card), {"x": {"phases": 3}})
        assert rendezvous.tell(decided) == decided
        assert rendezvous.tell(View("world", 1, (second.card,), {})) == decided
        assert rendezvous.tell(View("world", 2, (second.card,), {})).generation == 2
        part = View("part", 3, (first.card,), {})
        assert rendezvous.tell(part) == part
        assert [card.identity for card in rendezvous.members("world")] == [second.identity]
    finally:
        for member in (keeper, first, second):
            member.close()


def test_a_store_of_torchs_says_who_has_gone_on_until_it_is_gone(member: Member) -> None:
    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tell = told(TCPStore("127.0.0.1", served.port, is_master=False))
    alone, all_of_them = View("world", 1, (), {}), View("world", 1, (member.card,), {"x": {"phases": 3}})
    assert tell(all_of_them) == all_of_them
    assert tell(alone) == all_of_them
    assert tell(View("part", 1, (), {})).members == ()
    del served
    began = time.monotonic()
    assert tell(alone) == alone
    assert time.monotonic() - began < 10


def test_of_two_communicators_of_one_name_each_has_its_own_generations() -> None:
    tell = told(HashStore())
    one, other = (Member(SECRET) for _ in range(2))
    try:
        for mine in (one, other):
            made = View.first("row", (mine.card,))
            after = View("row", 1, made.members, {}, made.origin)
            assert View.from_fields(after.as_fields()) == after
            assert tell(after) == after
    finally:
        one.close()
        other.close()


def test_a_view_that_its_decider_left_word_of_counts_for_those_who_are_in_it() -> None:
    """It was decided without the second, and the first has ended since: the third, who comes to the second, goes on."""
    tell = told(HashStore())
    first, second, third = members = [Member(SECRET) for _ in range(3)]
    start = View.first("world", tuple(member.card for member in members))
    for member in members:
        member.adopt(start)
        member.approved = tell
    decided = View("world", 1, (first.card, third.card), {}, start.origin)
    assert tell(decided) == decided
    first.close()
    try:
        with ThreadPoolExecutor(2) as threads:
            comes = threads.submit(agree, third, start, {}, 5.0)
            decides = threads.submit(agree, second, start, {}, 5.0)
            assert comes.result(20) == decided
            with pytest.raises(PeerFailed, match="rank 1 of world was left out by those who went on: rank 0, rank 2"):
                decides.result(20)
    finally:
        second.close()
        third.close()
