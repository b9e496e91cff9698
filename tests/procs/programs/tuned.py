"""Prints the costs by which each rank chooses."""

import json

import ringred

comm = ringred.init()
print(f"rank {comm.rank}: {json.dumps(comm.tuning)}\n", end="", flush=True)
