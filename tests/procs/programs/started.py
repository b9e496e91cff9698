"""Six ranks, started once, on which many cases run one after the other; arguments: a folder, and the cases.

A case is NAME:RANKS. It runs on the first RANKS ranks, while the others sleep; nothing of it stays for the next case.
Every rank that took part prints a line of JSON with what it found, or how it failed.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import deterministic
import disagreements
import table
import torch

import ringred

CASES = {"table": table.check, "digests": deterministic.digests, "disagreements": disagreements.check}
PATIENCE = 300.0  # seconds that one case may take


def main():
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    world = ringred.init()
    for case in cases:
        name, ranks = case.split(":")
        over = folder / case
        if world.rank < int(ranks):
            comm = world.subset(range(int(ranks)), case)
            began = time.monotonic()
            try:
                said = {"found": CASES[name](comm)}
                comm.barrier()
            except Exception as failure:
                comm.abort(failure)
                said = {"failed": traceback.format_exc()}
            took = round(time.monotonic() - began, 1)
            said = {"case": case, "rank": world.rank, "transport": comm.transport.name, "seconds": took, **said}
            sys.stdout.write(f"{json.dumps(said)}\n")
            sys.stdout.flush()
            comm.close()
            if world.rank == 0:
                over.touch()
        until = time.monotonic() + PATIENCE
        while not over.exists():  # asleep: a rank that waits in MPI uses its core
            assert time.monotonic() < until, f"{case} is not over after {PATIENCE} s"
            time.sleep(0.05)


main()
