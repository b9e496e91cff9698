"""One rank ends in the middle, in the way that the argument says; the others are in a collective."""

import os
import signal
import sys
import time

import torch

import ringred

how = sys.argv[1]
comm = ringred.init()
comm.barrier()
print(f"rank {comm.rank} of {comm.size} is at work", flush=True)
if comm.rank == 1:
    time.sleep(0.3)
    print(f"dies at {time.time()}", flush=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises":
        raise ValueError("a bug of the user's")
    if how == "exits":
        sys.exit(3)
try:
    for _ in range(1000):
        comm.all_reduce(torch.ones(1000), algorithm="ring")
        time.sleep(0.01)
except ringred.RingredError as error:
    print(f"rank {comm.rank} raised {type(error).__name__}: {error}", flush=True)
    raise SystemExit(4) from error
