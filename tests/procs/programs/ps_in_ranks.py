"""Sync on servers in ranks, by shared memory, by messages, with and without keys and copies: the bits of DDP."""

import itertools

import torch
from torch import nn

import ringred
from ringred.parameter_server.policies import Sync


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 500), nn.ReLU(), nn.Linear(500, 7))


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(4, 300, generator=generator), torch.randint(0, 7, (4,), generator=generator)) for _ in range(10)
    ]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main():
    torch.set_num_threads(1)
    comm = ringred.init()
    wanted = make_model()
    wrapped = ringred.DistributedDataParallel(wanted, process_group=comm, deterministic=True)
    optimizer = torch.optim.Adam(wanted.parameters(), lr=0.01)
    for batch in batches(comm.rank):
        optimizer.zero_grad()
        loss_of(wrapped, batch).backward()
        optimizer.step()
    for shared, encrypt, replicate in itertools.product((True, False), repeat=3):
        model = make_model()
        placement = {"shared": shared, "encrypt": encrypt, "replicate": replicate, "comm": comm}
        with ringred.ParameterServer(
            model, lambda given: torch.optim.Adam(given, lr=0.01), Sync(), **placement
        ) as server:
            for batch in batches(comm.rank):
                assert server.pull()
                loss_of(model, batch).backward()
                assert server.push()
            server.pull()
        for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(ours, theirs), (shared, encrypt, replicate)
    print("equal to the bit\n", end="", flush=True)
    comm.close()


main()
