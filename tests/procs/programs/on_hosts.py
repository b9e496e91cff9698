"""Two hosts (network namespaces with names of their own, a cable between them) of two ranks each: argv has their task.

Needs root. `all` runs collectives and a training step over both, `servers` a parameter server, flat and by host, and
`death` kills the last rank in mid-collective. Prints one JSON line a rank.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from two_hosts import TwoHosts

RANKS, EACH = 4, 2


def say(**facts):
    print(json.dumps(facts), flush=True)


def everything(comm):
    import torch
    from torch import nn

    import ringred
    from ringred.collectives.registry import algorithms
    from ringred.testing.fake_device import FakeDevice

    right = []
    for name, entry in algorithms("all_reduce").items():
        if entry.native:
            continue
        for count in (0, 1, 1001, 400_000):
            for tensor in (torch.empty(count), comm.empty(count)):
                comm.all_reduce(tensor.fill_(comm.rank + 1.0), algorithm=name)
                right.append(bool((tensor == 10).all()))
    for root in range(RANKS):
        tensor = torch.full((300_000,), float(comm.rank))
        comm.broadcast(tensor, root)
        right.append(bool((tensor == root).all()))
    gathered = torch.empty(RANKS)
    comm.all_gather(gathered, torch.tensor([float(comm.rank)]))
    right.append(gathered.tolist() == [0, 1, 2, 3])
    for peer in range(RANKS):  # pairs within a host and between
        if peer != comm.rank:
            comm.send(torch.tensor([comm.rank]), peer, async_op=True)
    for peer in range(RANKS):
        if peer != comm.rank:
            came = torch.empty(1, dtype=torch.int64)
            comm.recv(came, peer)
            right.append(came.item() == peer)
    there = comm.on_device(lambda: FakeDevice(delay=(0.0002, comm.rank)), torch.device("cpu"))
    for name in ("direct", "ring", "tree", "hierarchical", "torus"):  # a device's memory on each host, and between
        for tensor in (torch.empty(100_000), there.empty(100_000)):
            there.all_reduce(tensor.fill_(comm.rank + 1.0), algorithm=name)
            right.append(bool((tensor == 10).all()))
    right.append(there.transport.name == "cuda_ipc+torch_p2p")
    torch.manual_seed(0)
    model = ringred.DistributedDataParallel(nn.Linear(100, 100, bias=False))
    model(torch.ones(1, 100) * (comm.rank + 1)).sum().backward()
    right.append(bool((model.module.weight.grad == 2.5).all()))
    say(
        rank=comm.rank,
        host=socket.gethostname(),
        transport=comm.transport.name,
        hosts=comm.hosts,
        grid="hierarchical" in comm.explain(1 << 20) and "2x2" in comm.explain(1 << 20),
        near=comm.transport.windows,
        wrong=right.count(False),
        checked=len(right),
    )
    comm.close()


def until_one_dies(comm):
    import torch

    import ringred

    comm.barrier()
    say(rank=comm.rank, ready=time.time())
    try:
        while True:
            comm.all_reduce(torch.ones(100_000))
    except ringred.RingredError as error:
        say(rank=comm.rank, raised=time.time(), error=str(error))
        os._exit(4)


def servers(comm):
    """Gradients of rank + 1, and a rate of one: each update takes 2.5 off. What goes between hosts is encrypted."""
    import torch
    from torch import nn

    import ringred
    from ringred.parameter_server.policies import Sync

    pushed, right = {}, []
    for hierarchy in ("flat", "host"):
        model = nn.Linear(300, 200)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        options = {"hierarchy": hierarchy, "comm": comm}
        with ringred.ParameterServer(model, lambda given: torch.optim.SGD(given, lr=1.0), Sync(), **options) as server:
            for _ in range(3):
                server.pull()
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, comm.rank + 1.0)
                server.push()
            server.pull()
            right += [bool((parameter == -7.5).all()) for parameter in model.parameters()]
            worker = server.worker
            pushed[hierarchy] = worker.bytes_pushed / 3
            near = sorted(worker.connection.values)
            state = server.state_dict()
            right.append(state["version"] == 3 and bool((state["tensors"]["bias"]["value"] == -7.5).all()))
    addresses = worker.connection.addresses
    say(rank=comm.rank, pushed=pushed, near=near, wrong=right.count(False), addresses=addresses)
    comm.close()


def main(task):
    with TwoHosts(EACH) as hosts:
        hosts.start(__file__, "rank", task, RINGRED_TIMEOUT=20)
        said = []
        if task == "death":
            said += [rank.stdout.readline() for rank in hosts.ranks]
            time.sleep(0.3)
            say(killed=time.time())
            os.kill(hosts.ranks[-1].pid, signal.SIGKILL)
        for printed in hosts.wait(100):
            said += printed.splitlines()
        for line in said:
            print(line.strip(), flush=True)
        say(statuses=[rank.returncode for rank in hosts.ranks])


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        import ringred

        {"all": everything, "servers": servers, "death": until_one_dies}[sys.argv[2]](ringred.init())
    else:
        main(sys.argv[1])
