"""Trains 8 MB of parameters with deterministic=True by several caps and algorithms."""

import hashlib

import torch
from torch import nn

import ringred

CONFIGURATIONS = [
    *({"bucket_cap_mb": cap} for cap in (1, 5, 25)),
    *({"algorithm": algorithm, "bucket_cap_mb": 5} for algorithm in ("direct", "one_shot")),
]


def model():
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 1000)]
    with torch.no_grad():
        for layer in layers[::2]:
            for parameter in layer.parameters():
                parameter.uniform_(-0.03, 0.03, generator=generator)
    return nn.Sequential(*layers)


def digests(comm):
    """A digest of the parameters that each configuration comes to."""
    found = []
    for options in CONFIGURATIONS:
        wrapped = ringred.DistributedDataParallel(model(), process_group=comm, deterministic=True, **options)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01, momentum=0.9)
        for step in range(2):
            generator = torch.Generator().manual_seed(100 * comm.rank + step)
            optimizer.zero_grad()
            wrapped(torch.randn(8, 1000, generator=generator)).square().sum().backward()
            optimizer.step()
        digest = hashlib.sha256()
        for parameter in wrapped.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        found.append(digest.hexdigest())
    return found
