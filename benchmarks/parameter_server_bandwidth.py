"""What a push and a pull of 25 MiB take on one host, by shared memory and by ZeroMQ, beside what else moves bytes.

    launch/mpirun.sh 2 benchmarks/parameter_server_bandwidth.py --json out/parameter-server-bandwidth.json

Two workers at once, and one or two servers in their processes. A push ends when the servers hold the gradient, a pull
when the values are in the worker's tensor; the update between them is not part of either. GB/s are of one worker. The
limit is a copy from one tensor to another by both ranks at once. Gloo and MPI: rank 0 sends, rank 1 receives and sends
back; GB/s of one message.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Spread, context, interleaved, write_json
from tabulate import tabulate

import ringred
from ringred.parameter_server import messages as m
from ringred.parameter_server.hosting import Membership, Placement
from ringred.parameter_server.policies import Sync
from ringred.parameter_server.rules import Rule

WAYS = {"shared memory": (True, True), "ZeroMQ": (False, False), "ZeroMQ with CURVE": (False, True)}


class Exchange:
    """A worker of new servers, in a job of its own."""

    def __init__(self, comm: ringred.Communicator, way: str, shards: int, nbytes: int) -> None:
        shared, encrypt = WAYS[way]
        self.member = Membership(Placement(Sync(), shards=shards, comm=comm, shared=shared, encrypt=encrypt))
        self.worker, self.tensor = self.member.worker, torch.ones(nbytes // 4)
        self.worker.declare({"values": self.tensor}, Rule("assign", [{}]), [0])
        self.targets = self.worker.targets({"values": torch.empty_like(self.tensor)})
        self.pull_seconds = 0.0

    def push(self) -> float:
        """Seconds of a push; makes an update of it, and measures the pull that follows."""
        worker = self.worker
        least = worker.begin()
        self.tensor.add_(1)
        gradients = worker.gradients()
        began = time.perf_counter()
        worker.push(gradients, {"values": self.tensor})
        worker.connection.wait(gradients.parts)
        pushed = time.perf_counter() - began
        worker.commit(gradients, least)
        there = [worker.connection.ask(1 + shard, m.Pull(least + 1, ())) for shard in range(worker.shards)]
        worker.connection.wait(there)
        began = time.perf_counter()
        worker.version = worker.pull(self.targets, least + 1)
        self.pull_seconds = time.perf_counter() - began
        return pushed

    def pull(self) -> float:
        """Seconds of the pull after the last push."""
        return self.pull_seconds


def back_and_forth(send: Callable[[], Any], receive: Callable[[], Any], first: bool) -> Callable[[], float]:
    """Seconds of one message, as half of two."""

    def run() -> float:
        began = time.perf_counter()
        for step in (send, receive) if first else (receive, send):
            step()
        return (time.perf_counter() - began) / 2

    return run


def copier(nbytes: int) -> Callable[[], float]:
    source, target = torch.ones(nbytes // 4), torch.empty(nbytes // 4)

    def run() -> float:
        source.add_(1)
        began = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - began

    return run


def gloo(comm: ringred.Communicator, nbytes: int) -> Callable[[], float]:
    port = torch.tensor([29500 + os.getpid() % 2000])
    comm.broadcast(port, 0)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port.item()}", rank=comm.rank, world_size=2)
    tensor, peer = torch.ones(nbytes // 4), 1 - comm.rank
    return back_and_forth(lambda: dist.send(tensor, peer), lambda: dist.recv(tensor, peer), comm.rank == 0)


def mpi(comm: ringred.Communicator, nbytes: int) -> Callable[[], float]:
    from mpi4py import MPI

    array, peer = torch.ones(nbytes // 4).numpy(), 1 - comm.rank
    world = MPI.COMM_WORLD
    return back_and_forth(lambda: world.Send(array, peer), lambda: world.Recv(array, peer), comm.rank == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=25 << 20)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm = ringred.init()
    if comm.size != 2:
        raise SystemExit(f"expected two ranks, got {comm.size}: launch/mpirun.sh 2 {Path(__file__).name}")
    exchanges = {(way, shards): Exchange(comm, way, shards, options.bytes) for way in WAYS for shards in (1, 2)}
    measures: dict[str, Callable[[], float]] = {"copy": copier(options.bytes)}
    measures |= {"Gloo": gloo(comm, options.bytes), "MPI": mpi(comm, options.bytes)}
    for (way, shards), exchange in exchanges.items():
        measures[f"{way}, {shards} servers: push"] = exchange.push
        measures[f"{way}, {shards} servers: pull"] = exchange.pull

    def together(measure: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            comm.barrier()
            return measure()

        return run

    samples = interleaved({name: together(measure) for name, measure in measures.items()}, options.rounds + 3)
    rows = []
    for name, seconds in samples.items():
        spread = Spread.of([options.bytes / second / 1e9 for second in seconds[3:]])
        rows.append({"what": name, "GBps": spread.median, "low": spread.low, "high": spread.high})
    for (way, shards), _ in exchanges.items():
        pair = [f"{way}, {shards} servers: {half}" for half in ("push", "pull")]
        both = [sum(halves) for halves in zip(*(samples[name][3:] for name in pair), strict=True)]
        spread = Spread.of([2 * options.bytes / second / 1e9 for second in both])
        rows.append(
            {"what": f"{way}, {shards} servers: both", "GBps": spread.median, "low": spread.low, "high": spread.high}
        )
    limit = rows[0]["GBps"]
    if comm.rank == 0:
        table = [(r["what"], r["GBps"], f"{r['low']:.2f}..{r['high']:.2f}", f"{r['GBps'] / limit:.0%}") for r in rows]
        print(
            tabulate(
                table,
                headers=["25 MiB" if options.bytes == 25 << 20 else "", "GB/s", "quartiles", "of a copy"],
                floatfmt=".2f",
            )
        )
        if options.json is not None:
            write_json(options.json, context() | {"bytes": options.bytes, "rows": rows})
    for exchange in exchanges.values():
        exchange.member.close()
    dist.destroy_process_group()
    comm.close()


if __name__ == "__main__":
    main()
