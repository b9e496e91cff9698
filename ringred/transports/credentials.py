"""Who is at the other end of a Unix socket, as the kernel reports it."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

__all__ = ["Credentials", "credentials_of"]

_CREDENTIALS = struct.Struct("3i")  # process, user, group


class Credentials(NamedTuple):
    """Ids of a process and of its user; 0 for a process that is not visible here."""

    process: int
    user: int


def credentials_of(connection: socket.socket) -> Credentials:
    """Those of the process at the other end, when it connected or began to listen."""
    process, user, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return Credentials(process, user)
