"""What each rank of the laboratory's all-reduce experiment does; rank 0 prints one JSON line a measured case."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import ringred
from lab.costs import calibrated


def seconds(comm: ringred.Communicator, call: Callable[[], object], least: float, most_calls: int) -> list[float]:
    """Times of `call`, all ranks together: enough to take `least` seconds, three or more, the same on all ranks."""
    comm.barrier()
    began = time.perf_counter()
    call()
    took = torch.tensor([time.perf_counter() - began])
    comm.all_reduce(took, "max")
    calls = max(3, min(most_calls, int(least / max(took.item(), 1e-6))))
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

        dist.init_process_group("gloo")
        peers["gloo"] = dist.all_reduce
    calibrations = [calibrated(comm)]
    for nbytes in task["sizes"]:
        tensor = torch.ones(nbytes // 4)
        for name in task["ways"]:

            def call(name: str = name, tensor: torch.Tensor = tensor) -> object:
                return peers[name](tensor) if name in peers else comm.all_reduce(tensor, algorithm=name)

            tensor.fill_(0.0)
            times = seconds(comm, call, task["seconds"], 200)
            if comm.rank == 0:
                found = {"nbytes": nbytes, "way": name, "seconds": statistics.median(times), "calls": len(times)}
                print(json.dumps({**found, "low": min(times), "high": max(times)}), flush=True)
    calibrations.append(calibrated(comm))
    if comm.rank == 0:
        print(json.dumps({"calibrations": calibrations}), flush=True)
    if peers:
        dist.destroy_process_group()
    comm.close()


if __name__ == "__main__":
    main()
