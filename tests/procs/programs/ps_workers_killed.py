"""Workers of a parameter server that are killed at random moments and started again, and what the updates come to.

Arguments: kills, seed. Each gradient is one everywhere and the rate is one, so that each update takes exactly one off:
a gradient that was lost after it was acknowledged, or applied twice, or half, shows.
"""

import atexit
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from ringred.parameter_server.policies import KAsync
from ringred.parameter_server.serving import serve
from ringred.parameter_server.training import ParameterServer

WORKERS, SHARDS, ELEMENTS = 3, 2, 50_000


def forked(body, *arguments):
    """A process that has torch loaded already."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            body(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return process


def work(folder, number, until):
    """Pushes as long as the file `until` is not there; counts what was acknowledged in a file that only grows."""
    weight = nn.Parameter(torch.zeros(ELEMENTS))
    server = ParameterServer([weight], lambda given: torch.optim.SGD(given, lr=1.0), servers=folder, worker=number)
    acknowledged = os.open(folder / f"acknowledged-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while server.pull() and not until.exists():
        assert bool((weight <= -server.version).all()), "it is as new as it says, or newer on some shard"
        assert len(weight.unique()) <= SHARDS, "an update is on all elements of a shard, or on none"
        weight.grad = torch.ones(ELEMENTS)
        server.push()
        os.write(acknowledged, b".")
    server.close()


def judge(folder):
    """A worker that came last: what the values are, and what the servers say."""
    weight = nn.Parameter(torch.zeros(ELEMENTS))
    server = ParameterServer([weight], lambda given: torch.optim.SGD(given, lr=1.0), servers=folder, worker=WORKERS)
    (folder / "ready").touch()
    while not (folder / "over").exists():
        time.sleep(0.02)
    report = server.report()
    server.worker.pull(server.worker.targets(server.parameters), report.updates)
    acknowledged = sum((folder / f"acknowledged-{number}").stat().st_size for number in range(WORKERS))
    applied = sum(report.applied.values())
    assert applied == report.updates == -weight[0].item(), (report, weight[0])
    assert bool((weight == weight[0]).all())
    # A worker may be killed after its gradient was acknowledged and before it counted that.
    print(f"{report.updates} updates, {applied} gradients, {acknowledged} acknowledged, weight {weight[0].item()}")
    assert acknowledged <= applied
    server.close()


def end(processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def main():
    kills, seed = int(sys.argv[1]), int(sys.argv[2])
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()  # loads what each process would load again
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, until = Path(name), Path(name) / "until"
        servers = [
            forked(lambda shard=shard: serve(KAsync(1), WORKERS + 1, number=shard, shards=SHARDS, folder=folder))
            for shard in range(SHARDS)
        ]
        workers = {number: forked(work, folder, number, until) for number in range(WORKERS)}
        judging = forked(judge, folder)
        everybody = [*servers, *workers.values(), judging]
        atexit.register(end, everybody)
        while not (folder / "ready").exists():
            time.sleep(0.01)
        for _ in range(kills):
            time.sleep(generator.expovariate(1 / 0.03))
            number = generator.randrange(WORKERS)
            os.kill(workers[number], signal.SIGKILL)
            _, status = os.waitpid(workers[number], 0)
            assert status == signal.SIGKILL, f"worker {number} ended by itself: {status}"
            everybody.remove(workers[number])
            workers[number] = forked(work, folder, number, until)
            everybody.append(workers[number])
        until.touch()
        for number, process in workers.items():
            assert os.waitpid(process, 0)[1] == 0, f"worker {number} failed"
        (folder / "over").touch()
        assert os.waitpid(judging, 0)[1] == 0
        assert [os.waitpid(process, 0)[1] for process in servers] == [0, 0]
        everybody.clear()
    print(f"{kills} workers killed: every update once")


main()
