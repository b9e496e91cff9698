"""Rank 2 is stopped until the others have shrunk without it and gone, and then looks for ranks to go on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import torch

import ringred

comm = ringred.init()
comm.barrier()
said = {"was": comm.rank, "size": 0, "why": ""}
if comm.rank == 2:
    waker = subprocess.Popen(["sh", "-c", f"sleep 14; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    waker.wait()
try:
    comm.barrier()
except ringred.CollectiveTimeout:
    try:
        comm = comm.shrink()
        comm.all_reduce(torch.ones(1))
        said["size"] = comm.size
    except ringred.PeerFailed as failure:
        said["why"] = str(failure)
os.write(1, (json.dumps(said) + "\n").encode())  # at once: lines of several ranks do not mix
comm.close()
