"""All-reduce on the ranks that there are: the time of a call, and the bus bandwidth, beside torch on Gloo."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringred.communicator import Communicator
from ringred.testing.bench.measuring import Progress, interleaved, slowest

__all__ = ["GLOO", "bus_bandwidth", "measure"]

GLOO = "gloo"
_SAMPLE_SECONDS = 20e-3  # of calls in one measurement: several of a slow system too
_MOST_CALLS = 5000


def bus_bandwidth(size: int, nbytes: int, seconds: float) -> float:
    """Bytes per second that each rank's link carries if no byte goes twice: 2(P−1)/P·N/t, as nccl-tests count it."""
    return 2 * (size - 1) / size * nbytes / seconds if size > 1 else nbytes / seconds


def measure(
    comm: Communicator, sizes: Sequence[int], systems: Sequence[str], rounds: int, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each size in bytes of float32 and each system: an algorithm of ringred, "auto", or "gloo". Collective.

    Every buffer is written before a call and read after it, as a training step does; the time is that of the slowest
    rank.
    """
    rows = []
    for nbytes in sizes:
        buffers = {name: torch.empty(max(1, nbytes // 4)) for name in systems}
        calls = {name: _call(comm, name, buffer) for name, buffer in buffers.items()}
        counts = _counts(comm, calls)
        measures = {name: _timer(call, buffers[name], counts[name]) for name, call in calls.items()}
        for name, spread in slowest(comm, interleaved(measures, rounds, progress)).items():
            rows.append(
                {
                    "bytes": buffers[name].nbytes,
                    "system": name,
                    "seconds": spread.median,
                    "low": spread.low,
                    "high": spread.high,
                    "bus_bandwidth": bus_bandwidth(comm.size, buffers[name].nbytes, spread.median),
                }
            )
    return rows


def _call(comm: Communicator, system: str, buffer: Tensor) -> Callable[[], object]:
    if system == GLOO:
        return lambda: dist.all_reduce(buffer)
    return lambda: comm.all_reduce(buffer, algorithm=system)


def _timer(call: Callable[[], object], buffer: Tensor, count: int) -> Callable[[], float]:
    def run() -> float:
        spent = 0.0
        for turn in range(-1, count):  # the first waits for ranks that the system before has let go later
            buffer.fill_(turn)
            began = time.perf_counter()
            call()
            if turn >= 0:
                spent += time.perf_counter() - began
            buffer[-1].item()
        return spent / count

    return run


def _counts(comm: Communicator, calls: dict[str, Callable[[], object]]) -> dict[str, int]:
    """As many calls of each as take a sample's time, by its own; the same on all ranks."""
    seconds = []
    for call in calls.values():
        for _ in range(2):
            call()
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    table = torch.tensor(seconds, dtype=torch.float64)
    comm.all_reduce(table, "max", algorithm="one_shot")
    counts = [int(_SAMPLE_SECONDS / max(longest, 1e-9)) for longest in table.tolist()]
    return {name: max(1, min(_MOST_CALLS, count)) for name, count in zip(calls, counts, strict=True)}
