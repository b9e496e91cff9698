"""Rank 1 is killed in the middle of its all-reduces; the others shrink, and print what they are then."""

import ctypes
import json
import os

import torch
from mpi4py import MPI

import ringred
from ringred.testing import faults

comm = ringred.init()
faults.inject(comm, "kill rank 1 at message 60")
try:
    while True:
        comm.all_reduce(torch.ones(1000), algorithm="ring")
except ringred.PeerFailed as failure:
    said = {"why": str(failure), "from": comm.transport.name}
    comm = comm.shrink()
    total = torch.ones(3)
    comm.all_reduce(total)
    waits = not ctypes.c_bool.in_dll(ctypes.CDLL(MPI.__file__), "ompi_async_mpi_finalize").value
    said |= {"rank": comm.rank, "size": comm.size, "sum": total[0].item(), "to": comm.transport.name, "waits": waits}
    os.write(1, (json.dumps(said) + "\n").encode())
    comm.close()
