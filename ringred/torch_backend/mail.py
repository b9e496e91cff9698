"""Messages between two ranks of a torch process group, with tags and from any source: by a Gloo group of their own.

Because that group is separate, a message never waits for a collective, nor a collective for a message. Tensors of a
device go by the host's memory: they are copied there when they are sent, and from there when the receiver waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as _distributed
from torch import Tensor

from ringred.errors import CollectiveTimeout, PeerFailed, RingredError, UnsupportedTensor
from ringred.runtime.compiling import never_compiled
from ringred.transports.torch_p2p import gloo_group

dist: Any = _distributed  # torch declares no types for most of what is used here

__all__ = ["Mail", "Message"]


@never_compiled
class Message(dist.Work):  # type: ignore[misc]
    """A message in flight: wraps Gloo's work and raises its failures as ringred's exceptions."""

    def __init__(self, mail: Mail, work: Any, what: str, tensors: list[Tensor]) -> None:
        super().__init__()
        self._mail, self._work, self._what, self._tensors = mail, work, what, tensors
        self._waiting = threading.Lock()  # Gloo's work can be waited for once
        self._done = False
        self._failure: RingredError | None = None
        self._arrived: list[tuple[Tensor, Tensor]] = []

    def then_copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """What was received is copied, (target, source), by the first who waits."""
        self._arrived = pairs

    def wait(self, timeout: timedelta | None = None) -> bool:
        began = time.monotonic()
        seconds = timeout.total_seconds() if timeout is not None and timeout.total_seconds() > 0 else -1.0
        if not self._waiting.acquire(timeout=seconds):
            raise CollectiveTimeout(f"rank {self._mail.rank}: {self._what}: not done after {timeout}")
        try:
            if not self._done:
                self._work.wait(*([timeout] if seconds > 0 else []))
                for target, source in self._arrived:
                    target.copy_(source)
                self._done = True
        except RuntimeError as failure:
            self._failure = self._mail.failure(self._what, failure, time.monotonic() - began)
            self._done = True
        finally:
            self._waiting.release()
        if self._failure is not None:
            raise self._failure
        return True

    def get_future(self) -> Any:
        raise NotImplementedError("a message has no future, as on Gloo: wait() for it")

    def is_completed(self) -> bool:
        return self._done or bool(self._work.is_completed())

    def is_success(self) -> bool:
        return self.is_completed() and self._failure is None

    def exception(self) -> BaseException | None:
        return self._failure

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[Tensor]:
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        return int(self._work._source_rank())

    _source_rank = source_rank


class Mail:
    """The messages of one rank. Constructing it is collective: it waits at most `timeout` seconds for all ranks."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float, address: str | None) -> None:
        self.rank = rank
        self._gloo = gloo_group(dist.PrefixStore("mail", store), rank, size, timeout, address)

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int) -> Message:
        if dst == self.rank:
            raise ValueError(f"rank {dst}: send: to itself")
        return self._posted(
            f"send to rank {dst}, tag {tag}", tensors, lambda ready: self._gloo.send(ready, dst, tag), True
        )

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int) -> Message:
        if src == self.rank:
            raise ValueError(f"rank {src}: recv: from itself")
        return self._posted(f"recv from rank {src}, tag {tag}", tensors, lambda ready: self._gloo.recv(ready, src, tag))

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int) -> Message:
        return self._posted(
            f"recv from any rank, tag {tag}", tensors, lambda ready: self._gloo.recv_anysource(ready, tag)
        )

    def _posted(
        self, what: str, tensors: Sequence[Tensor], post: Callable[[list[Tensor]], Any], sends: bool = False
    ) -> Message:
        began = time.monotonic()
        here = [tensor if tensor.is_cpu else _on_the_host(tensor, sends) for tensor in tensors]
        try:
            message = Message(self, post(here), what, here if sends else list(tensors))
        except RuntimeError as failure:
            raise self.failure(what, failure, time.monotonic() - began) from failure
        if not sends:
            pairs = zip(tensors, here, strict=True)
            message.then_copy([(tensor, near) for tensor, near in pairs if near is not tensor])
        return message

    def failure(self, what: str, failure: RuntimeError, waited: float) -> RingredError:
        """Gloo's exception as one of ours."""
        where, text = f"rank {self.rank}: {what}", str(failure)
        if "Timed out" in text:
            return CollectiveTimeout(f"{where}: not done after {waited:.1f} s")
        if any(word in text for word in ("closed", "closure", "onnection", "reset")):
            return PeerFailed(f"{where}: {text}")
        return UnsupportedTensor(f"{where}: {text}")

    def set_timeout(self, timeout: timedelta) -> None:
        self._gloo._set_default_timeout(timeout)

    def abort(self) -> None:
        self._gloo.abort()

    def shutdown(self) -> None:
        self._gloo.shutdown()


def _on_the_host(tensor: Tensor, filled: bool) -> Tensor:
    near = torch.empty(tensor.shape, dtype=tensor.dtype)
    return near.copy_(tensor) if filled else near
