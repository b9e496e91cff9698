"""A worker of the servers in a folder that pushes until that fails, and says how."""

import sys

import torch
from torch import nn

import ringred

weight = nn.Parameter(torch.zeros(10))
server = ringred.ParameterServer([weight], lambda given: torch.optim.SGD(given, lr=1.0), servers=sys.argv[1], worker=0)
server.pull()
print("pulled", flush=True)
try:
    while True:
        weight.grad = torch.ones(10)
        server.push()
        server.pull()
except ringred.PeerFailed as failure:
    print(f"PeerFailed: {failure}", flush=True)
