"""A port of this host for a process that listens later, and that nothing else is given until then."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["reserved_port"]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that a child may listen at while this lasts, if it asks for SO_REUSEADDR, as torch's store does.

    The socket stays bound and does not listen: so the kernel gives the port to no connection and to no other search
    for a free port. A port that was only looked up may be another's by the time a rank has imported torch.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield int(held.getsockname()[1])
