"""A reserved port: a store can listen at it, and nothing else is given it."""

import socket

import pytest
import torch.distributed as dist

from ringred.testing.ports import reserved_port


def test_a_store_listens_at_a_reserved_port() -> None:
    with reserved_port() as port:
        store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("key", "value")
        assert store.get("key") == b"value"


def test_a_reserved_port_is_nobody_elses() -> None:
    with reserved_port() as port, pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", port))
