"""examples/train_digits.py, of which rank 1 is killed in the step `argv[1]` of its first life (−1: never)."""

import os
import signal
import sys

import torch

from examples import train_digits

if __name__ == "__main__":
    dies_at, steps = int(sys.argv.pop(1)), 0
    step = torch.optim.SGD.step

    def counted(self, *arguments):
        global steps
        steps += 1
        if steps == dies_at and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            print("rank 1 dies", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    torch.optim.SGD.step = counted
    train_digits.main()
