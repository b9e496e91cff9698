"""Two hosts (network namespaces with names of their own, a cable between them) of two ranks each: argv has their task.

Needs root. `all` runs collectives and a training step over both; `death` kills the last rank in mid-collective. Prints
one JSON line a rank.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

RANKS, EACH = 4, 2
SPACES = [f"ringred-{os.getpid()}-{host}" for host in range(2)]
ADDRESSES = ["10.77.0.1", "10.77.0.2"]


def say(**facts):
    print(json.dumps(facts), flush=True)


def everything(comm):
    import torch
    from torch import nn

    import ringred
    from ringred.collectives.registry import algorithms

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


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def lay_cable():
    for space in SPACES:
        ip("netns", "add", space)
    # Both ends are made where they belong: this namespace never sees them.
    ip("-n", SPACES[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", SPACES[1])
    for space, address in zip(SPACES, ADDRESSES, strict=True):
        ip("-n", space, "address", "add", f"{address}/24", "dev", "cable")
        ip("-n", space, "link", "set", "cable", "up")
        ip("-n", space, "link", "set", "lo", "up")


def start(rank, task):
    host = rank // EACH
    there = {"RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29501}
    there |= {"RINGRED_INTERFACE": ADDRESSES[host], "RINGRED_TIMEOUT": "20"}
    command = ["ip", "netns", "exec", SPACES[host], "unshare", "--uts", sys.executable, __file__, "rank", task]
    environment = {**os.environ, **{name: str(value) for name, value in there.items()}, "HOST_NAME": f"host{host}"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def main(task):
    lay_cable()
    try:
        ranks = [start(rank, task) for rank in range(RANKS)]
        said = []
        if task == "death":
            said += [rank.stdout.readline() for rank in ranks]
            time.sleep(0.3)
            say(killed=time.time())
            os.kill(ranks[-1].pid, signal.SIGKILL)
        for rank in ranks:
            said += rank.communicate(timeout=60)[0].splitlines()
        for line in said:
            print(line.strip(), flush=True)
        say(statuses=[rank.returncode for rank in ranks])
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
        for space in SPACES:
            ip("netns", "delete", space)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        socket.sethostname(os.environ["HOST_NAME"])
        import ringred

        {"all": everything, "death": until_one_dies}[sys.argv[2]](ringred.init())
    else:
        main(sys.argv[1])
