"""Whether somebody of another place lives: said and answered on a connection of its own, for on one with data a beat
waits until the data before it have passed, and on a slow network that is longer than anybody should be silent."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import zmq

from ringred.parameter_server.door import secured
from ringred.parameter_server.keys import Keys
from ringred.parameter_server.wire import pack

__all__ = ["BEAT", "SILENCE", "Far", "Pulse", "whose"]

SILENCE = 15.0  # seconds after which somebody of another place counts as gone
BEAT = 3.0  # seconds from one beat to the next
_MARK = b"/pulse"


class Pulse:
    """From `name`, as the server at `address` knows it; what comes back is noticed by `poller`."""

    def __init__(
        self, context: zmq.Context[Any], poller: zmq.Poller, address: str, name: bytes, keys: Keys | None
    ) -> None:
        self._poller = poller
        self.link: zmq.Socket[bytes] = secured(context.socket(zmq.DEALER), keys)
        self.link.set(zmq.ROUTING_ID, name + _MARK)
        self.link.connect(address)
        poller.register(self.link, zmq.POLLIN)
        self.heard = time.monotonic()

    def beat(self, message: Any) -> None:
        """Says that this end lives."""
        with contextlib.suppress(zmq.Again):
            self.link.send(pack(0, 0, message), zmq.NOBLOCK)

    def take(self) -> None:
        """Something came from there: this, or anything else."""
        self.heard = time.monotonic()
        with contextlib.suppress(zmq.Again):
            while True:
                self.link.recv(zmq.NOBLOCK)

    @property
    def silent(self) -> bool:
        """Whether nothing came for too long."""
        return time.monotonic() - self.heard > SILENCE

    def close(self) -> None:
        """Ends the connection."""
        self._poller.unregister(self.link)
        self.link.close(0)


class Far:
    """A server of another place: its pulse, and what tells when `link`, whose connection was lost, has a new one."""

    def __init__(self, pulse: Pulse, link: zmq.Socket[bytes]) -> None:
        self.pulse, self._link = pulse, link
        self.again = link.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def close(self, poller: zmq.Poller) -> None:
        poller.unregister(self.again)
        self._link.disable_monitor()
        self.again.close(0)
        self.pulse.close()


def whose(name: bytes) -> bytes:
    """The name of the one whose pulse has this name; another name is its own."""
    return name.removesuffix(_MARK)
