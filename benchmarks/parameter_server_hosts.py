"""A parameter server over two hosts: every rank by itself, and the ranks of a host as one worker.

    python benchmarks/parameter_server_hosts.py --each 2 --mbit 200 --json out/parameter-server-hosts.json

Needs root: the hosts are network namespaces with a cable between them. A round is a pull and a push of all parameters
under Sync; all ranks host a shard. Predicted: the cost model with the cable's α and β.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import Spread, context, write_json
from tabulate import tabulate
from torch import nn
from two_hosts import TwoHosts

import ringred
from ringred.parameter_server.policies import Sync
from ringred.parameter_server.price import price
from ringred.runtime.select import machine_model
from ringred.topology.model import hosts as topology_of

WAYS = ("flat", "host")
ALPHA = 80e-6  # of the cable


def rank_main(nbytes: int, rounds: int) -> None:
    """Rounds of both ways, in turn; rank 0 prints the seconds of each."""
    torch.set_num_threads(1)
    comm = ringred.init()
    servers = {}
    for way in WAYS:
        model = nn.ParameterList([nn.Parameter(torch.zeros(nbytes // 16)) for _ in range(4)])

        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=1.0)

        servers[way] = ringred.ParameterServer(model, optimizer, Sync(), hierarchy=way, comm=comm)
        servers[way].pull()
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, server in servers.items():
            comm.barrier()
            began = time.monotonic()
            for parameter in server.parameters.values():
                parameter.grad = torch.ones_like(parameter)
            server.push()
            server.pull()
            comm.barrier()
            samples[way].append(time.monotonic() - began)
    if comm.rank == 0:
        print(json.dumps({"samples": samples, "hosts": comm.hosts, "transport": comm.transport.name}))
    for server in servers.values():
        server.close()
    comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=2, help="ranks on a host")
    parser.add_argument("--mbit", type=int, default=200, help="of the cable, each way")
    parser.add_argument("--mib", type=float, default=4.0, help="of parameters")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    nbytes = int(options.mib * 2**20)
    if options.rank:
        rank_main(nbytes, options.rounds)
        return
    with TwoHosts(options.each, options.mbit) as hosts:
        hosts.start(__file__, *sys.argv[1:], "--rank", RINGRED_TIMEOUT=120)
        printed = hosts.wait(600)
        if any(rank.returncode for rank in hosts.ranks):
            raise SystemExit(f"ranks ended with {[rank.returncode for rank in hosts.ranks]}")
    found = json.loads(next(line for line in printed[0].splitlines() if line.startswith("{")))
    inside = machine_model("shm", tuple(found["hosts"])).distance[0]
    model = topology_of(found["hosts"], inside, (ALPHA, 8 / (options.mbit * 1e6), 0.0), 0.1e-9)
    rows = []
    for way in WAYS:
        spread = Spread.of(found["samples"][way][1:])
        predicted = price(nbytes, found["hosts"], len(found["hosts"]), model, by_host=way == "host")
        rows.append({"way": way, "seconds": spread.median, "low": spread.low, "high": spread.high})
        rows[-1] |= {"predicted": predicted}
    print(f"{options.mib:g} MiB, 2 hosts with {options.each} ranks, {options.mbit} Mbit/s, {found['transport']}, keys.")
    table = [(row["way"], *(row[name] * 1e3 for name in ("seconds", "low", "high", "predicted"))) for row in rows]
    print(tabulate(table, headers=["", "ms a round", "lower", "upper quartile", "predicted"], floatfmt=".0f"))
    ratios = [rows[0][name] / rows[1][name] for name in ("seconds", "predicted")]
    print(f"by host is {ratios[0]:.2f} times as fast; predicted {ratios[1]:.2f}")
    if options.json is not None:
        write_json(options.json, {**context(), **vars(options), "json": None, "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
