"""One of 4 ranks is killed at a random moment, again and again: argv has the number of times and the seed, and whether
the memory is that of a fake device.

The parent spawns ranks as torchrun does, by RANK and MASTER_ADDR, and prints what the survivors said, when.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

from ringred.testing.ports import reserved_port

RANKS = 4


def rank_main():
    import torch

    import ringred

    comm = ringred.init()
    if "device" in sys.argv:
        from ringred.testing.fake_device import FakeDevice

        comm = comm.on_device(lambda: FakeDevice(delay=(0.001, comm.rank)), torch.device("cpu"))
    comm.barrier()
    print(json.dumps({"rank": comm.rank, "ready": time.time()}), flush=True)
    sizes = (1, 1000, 100_000, 1_000_000)
    window = comm.empty(1_000_000)
    turn = 0
    try:
        while True:
            turn += 1
            count = sizes[turn % 4]
            memory = window[:count] if turn % 3 else torch.empty(count)
            comm.all_reduce(memory.fill_(1.0), algorithm=("ring", "torus", "one_shot", "tree")[turn // 4 % 4])
            assert memory[0] == memory[-1] == RANKS
    except ringred.RingredError as error:
        print(json.dumps({"rank": comm.rank, "raised": time.time(), "error": str(error)}), flush=True)
        os._exit(4)


def seconds_until_all_raised(generator, port):
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "rank", *sys.argv[3:]],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.stdout.readline()
    victim = generator.randrange(1, RANKS)  # rank 0 serves the store, as torchrun's agent would
    time.sleep(generator.random() * 0.3)
    died = time.time()
    os.kill(ranks[victim].pid, signal.SIGKILL)
    took = []
    for number, rank in enumerate(ranks):
        said, _ = rank.communicate(timeout=20)
        if number != victim:
            last = json.loads(said.splitlines()[-1])
            assert f"rank {victim}" in last["error"].partition(":")[2], (victim, last)
            took.append(last["raised"] - died)
    return max(took)


if sys.argv[1] == "rank":
    rank_main()
else:
    chosen = random.Random(int(sys.argv[2]))
    with reserved_port() as port:
        slowest = [seconds_until_all_raised(chosen, port) for _ in range(int(sys.argv[1]))]
    print(f"killed {len(slowest)} times: survivors raised within {max(slowest):.3f} s", flush=True)
