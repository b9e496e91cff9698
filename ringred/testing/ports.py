"""A port of this host for a process that listens later, and that nothing else is given until then."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["reserved_port"]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that a child may listen at while this lasts, if it asks for SO_REUSEADDR, as torch's store does.

    A socket stays bound to it at every address, and does not listen: so the kernel gives the port to no connection and
    to no other search for a free port. One that was only looked up may be another's once a rank has imported torch.
    """
    both = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as held:
        if both:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield int(held.getsockname()[1])
