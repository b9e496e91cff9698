"""A server of each of many jobs is killed at a random moment; its copy goes on. Arguments: kills, seed."""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from ps_job import Job


def main():
    kills, seed = int(sys.argv[1]), int(sys.argv[2])
    generator = random.Random(seed)
    for _ in range(kills):
        with tempfile.TemporaryDirectory() as folder:
            shards = generator.randint(2, 3)
            job = Job(Path(folder), workers=2, shards=shards, replicate=True)
            time.sleep(generator.uniform(0, 0.3))
            victim = generator.randrange(shards)
            print(f"server {victim} of {shards} is killed", end=": ", flush=True)
            process = job.servers.pop(victim)
            os.kill(process, signal.SIGKILL)
            assert os.waitpid(process, 0)[1] == signal.SIGKILL
            time.sleep(generator.uniform(0, 0.2))
            job.over()
    print(f"{kills} servers killed: every update once")


main()
