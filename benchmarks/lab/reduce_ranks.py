"""What each rank of the laboratory's all-reduce experiment does; rank 0 prints one JSON line a measured case."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import ringred
from lab.costs import calibrated

ROUNDS = 3
"""Turns of all cases, with a calibration between them: the machine's other users are not the same all the time."""


def seconds(comm: ringred.Communicator, call: Callable[[], object], least: float, most_calls: int) -> list[float]:
    """Times of `call`, all ranks together: enough to take `least` seconds, one or more, the same on all ranks. The
    first one counts only if it takes that long by itself."""
    comm.barrier()
    began = time.perf_counter()
    call()
    took = torch.tensor([time.perf_counter() - began])
    comm.all_reduce(took, "max")
    if took.item() >= least:
        return [took.item()]
    calls = max(1, min(most_calls, int(least / max(took.item(), 1e-6))))
    times = []
    for _ in range(calls):
        comm.barrier()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times)
    comm.all_reduce(slowest, "max")  # a collective takes as long as its last rank
    return [float(took) for took in slowest]


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    comm = ringred.init()
    peers: dict[str, Callable[[torch.Tensor], object]] = {}
    if "gloo" in task["ways"]:
        import torch.distributed as dist

        dist.init_process_group("gloo", rank=comm.rank, world_size=comm.size)
        peers["gloo"] = dist.all_reduce
    if "MPI_Allreduce" in task["ways"]:
        from mpi4py import MPI

        peers["MPI_Allreduce"] = lambda tensor: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, tensor.numpy())
    calibrations = [calibrated(comm)]
    times: dict[tuple[int, str], list[float]] = {case: [] for case in itertools.product(task["sizes"], task["ways"])}
    for turn in range(ROUNDS):
        for at, (nbytes, name) in enumerate(times):
            tensor = torch.zeros(nbytes // 4).fill_(0.0)  # memory that was written

            def call(name: str = name, tensor: torch.Tensor = tensor) -> object:
                return peers[name](tensor) if name in peers else comm.all_reduce(tensor, algorithm=name)

            times[nbytes, name] += seconds(comm, call, task["seconds"] / ROUNDS, 200)
            if comm.rank == 0:
                print(json.dumps({"done": (turn * len(times) + at + 1) / ROUNDS / len(times)}), flush=True)
        calibrations.append(calibrated(comm))
    if comm.rank == 0:
        for (nbytes, name), took in times.items():
            found = {"nbytes": nbytes, "way": name, "seconds": statistics.median(took), "calls": len(took)}
            print(json.dumps({**found, "low": min(took), "high": max(took)}))
        print(json.dumps({"calibrations": calibrations}), flush=True)
    if "gloo" in peers:
        dist.destroy_process_group()
    comm.close()


if __name__ == "__main__":
    main()
