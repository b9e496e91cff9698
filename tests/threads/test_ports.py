"""A reserved port: a store can listen at it, and nothing else is given it."""

import errno
import os
import socket
import struct

import pytest
import torch.distributed as dist

from ringred.testing.ports import reserved_port

IP_LOCAL_PORT_RANGE = 51  # Linux 6.3: the ports from which this socket may be given one


def test_a_store_listens_at_a_reserved_port() -> None:
    with reserved_port() as port:
        store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("key", "value")
        assert store.get("key") == b"value"


def asking(family: int, port: int) -> socket.socket:
    """A socket that no other port than `port` can be given."""
    made = socket.socket(family)
    try:
        made.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
    except OSError as failure:
        pytest.skip(f"IP_LOCAL_PORT_RANGE: {failure}")
    return made


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "", "::1"])
def test_a_reserved_port_is_given_to_no_search_for_a_free_one(address: str) -> None:
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    family, used = (socket.AF_INET6 if ":" in address else socket.AF_INET), os.strerror(errno.EADDRINUSE)
    with reserved_port() as port, asking(family, port) as other, pytest.raises(OSError, match=used):
        other.bind((address, 0))


def test_a_reserved_port_is_given_to_no_connection() -> None:
    with (
        reserved_port() as port,
        socket.create_server(("127.0.0.1", 0)) as server,
        asking(socket.AF_INET, port) as other,
        pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)),
    ):
        other.connect(server.getsockname())
