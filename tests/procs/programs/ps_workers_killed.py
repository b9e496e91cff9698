"""Workers of a parameter server that are killed at random moments and started again. Arguments: kills, seed."""

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
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), workers=3, shards=2, replicate=False)
        for _ in range(kills):
            time.sleep(generator.expovariate(1 / 0.03))
            number = generator.randrange(3)
            os.kill(job.workers[number], signal.SIGKILL)
            _, status = os.waitpid(job.workers[number], 0)
            assert status == signal.SIGKILL, f"worker {number} ended by itself: {status}"
            job.restart(number)
        job.over()
    print(f"{kills} workers killed: every update once")


main()
