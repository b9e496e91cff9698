"""Rank 1 is killed in the middle of its all-reduces; the others shrink, and print what they are then."""

import json
import os

import torch

import ringred
from ringred.testing import faults

comm = ringred.init()
faults.inject(comm, "kill rank 1 at message 60")
try:
    while True:
        comm.all_reduce(torch.ones(1000), algorithm="ring")
except ringred.PeerFailed as failure:
    left = comm.shrink()
    total = torch.ones(3)
    left.all_reduce(total)
    said = {
        "rank": left.rank,
        "size": left.size,
        "sum": total[0].item(),
        "from": comm.transport.name,
        "why": str(failure),
    }
    os.write(1, (json.dumps({**said, "to": left.transport.name}) + "\n").encode())
    left.close()
