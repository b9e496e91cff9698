"""One rank of `test_window_seam.py`: a transport over a shared window in its smallest form.

It shows that the seam carries windows: reducing receives read the peer's memory, replacing ones are put there by
the sender where the verifier proves it safe. No credits, no futex, two ranks, x86 ordering: the transport that
ships is another one.
"""

from __future__ import annotations

import json
import mmap
import sys
import time

import torch

from ringred.collectives.registry import algorithms, prove
from ringred.executor import Piece, bind, run
from ringred.ops import Folder, ReduceOp
from ringred.schedule.lower import PostSend, lower
from ringred.select import share_bounds
from ringred.transports.base import Counters, Fault, FaultKind

ELEMENTS = 10007
WINDOW = 1 << 20  # bytes a rank: its buffer, and behind it the slots
DESCRIPTORS = 1 << 16  # messages one way in the whole life of a window


class Window:
    """Words: posted and consumed counts of each direction, then one (offset, bytes) for each message."""

    def __init__(self, fd: int, rank: int) -> None:
        self.map = mmap.mmap(fd, 0)
        words = 8 + 4 * DESCRIPTORS
        self.words = memoryview(self.map)[: 8 * words].cast("Q")
        base = torch.frombuffer(self.map, dtype=torch.uint8, offset=8 * words)
        self.windows = [base[:WINDOW], base[WINDOW : 2 * WINDOW]]
        self.rank, self.size, self.name = rank, 2, "window"
        self.counters, self.segment_bytes = Counters(), 4096
        self.sent = self.received = self.puts = 0

    def begin(self, contract: int, turn: int) -> None: ...

    def _descriptor(self, sender: int, index: int) -> int:
        return 8 + 2 * (sender * DESCRIPTORS + index)

    def isend(self, peer: int, src: torch.Tensor, put: bool = False) -> tuple[int, bool]:
        nbytes = src.numel() * src.element_size()
        offset = src.data_ptr() - self.windows[self.rank].data_ptr()
        if put:
            self.windows[peer][offset : offset + nbytes].copy_(src.view(torch.uint8))
            self.puts += 1
        at, index = self._descriptor(self.rank, self.sent), self.sent
        self.words[at], self.words[at + 1] = offset, nbytes
        self.sent += 1
        self.words[self.rank] = self.sent
        return index, put

    def irecv(
        self, peer: int, dst: torch.Tensor, lend: bool, put: bool = False
    ) -> tuple[int, torch.Tensor, bool, bool]:
        self.received += 1
        return self.received - 1, dst, lend, put

    def _until(self, word: int, count: int, deadline: float) -> None:
        while self.words[word] < count:
            time.sleep(0)
            if time.monotonic() > deadline:
                raise Fault(FaultKind.TIMEOUT, 1 - self.rank)

    def wait(self, request: tuple, deadline: float) -> torch.Tensor | None:
        peer = 1 - self.rank
        if len(request) == 2:
            index, put = request
            if not put:
                self._until(2 + self.rank, index + 1, deadline)
            return None
        index, dst, lend, put = request
        self._until(peer, index + 1, deadline)
        at = self._descriptor(peer, index)
        offset, nbytes = self.words[at], self.words[at + 1]
        view = self.windows[peer][offset : offset + nbytes].view(dst.dtype)
        if lend:
            return view
        if not put:
            dst.copy_(view)
        self.words[2 + peer] = index + 1
        return None

    def release(self, request: tuple) -> None:
        self.words[2 + 1 - self.rank] = request[0] + 1


def main(fd: int, rank: int) -> None:
    transport = Window(fd, rank)
    mine = transport.windows[rank].view(torch.int64)
    data = mine[:ELEMENTS]
    shown = {}
    for name, entry in sorted(algorithms("all_reduce").items()):
        if entry.native:
            continue
        group = entry.group(2)
        safe = prove(entry, group, puts=True).put_safe
        steps = entry.steps(group)
        receives = {
            # the put-safe sends of the peer, as this rank's receives: the n-th of one is the n-th of the other
            receive
            for send, receive in zip(_ops(steps(1 - rank), "Send"), _ops(steps(rank), "Recv"), strict=True)
            if (1 - rank, *send) in safe
        }
        program = lower(
            rank,
            steps(rank),
            share_bounds(ELEMENTS, entry.units(group)),
            512,
            put_safe=lambda step, op, safe=safe: (rank, step, op) in safe,
            put_received=lambda step, op, receives=receives: (step, op) in receives,
        )
        plan = bind(program, [Piece(0, data)], Folder(ReduceOp.SUM, torch.int64, 2), slots=mine[ELEMENTS:])
        data.copy_(torch.arange(ELEMENTS) * (rank + 1))
        before = transport.puts
        run(plan, transport, time.monotonic() + 20)
        sends = sum(isinstance(op, PostSend) for op in program.instructions)
        wrong = int((data != torch.arange(ELEMENTS) * 3).sum())
        shown[name] = {"wrong": wrong, "sends": sends, "puts": transport.puts - before}
    print(json.dumps(shown))


def _ops(steps: list, kind: str) -> list[tuple[int, int]]:
    return [(s, at) for s, step in enumerate(steps) for at, op in enumerate(step) if type(op).__name__ == kind]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
