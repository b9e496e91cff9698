"""A parameter server's job of forked processes, for programs that kill some of them.

Each gradient is one everywhere and the rate is one, so that each update takes exactly one off: a gradient that was lost
after it was acknowledged, or applied twice, or half, shows.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
import traceback

import torch
from torch import nn

from ringred.parameter_server.policies import KAsync
from ringred.parameter_server.serving import serve
from ringred.parameter_server.training import ParameterServer

ELEMENTS = 50_000


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


class Job:
    """Servers, workers that push until `over` is called, and a judge who comes and stays with them. All processes end
    with this one."""

    def __init__(self, folder, workers, shards, replicate):
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()  # loads what each process would load again
        self.folder, self.count = folder, workers
        self.servers = [forked(self._serve, shard, shards, replicate) for shard in range(shards)]
        self.workers = {number: forked(self._work, number) for number in range(workers)}
        self.judge = forked(self._judge)
        atexit.register(self.end)
        while not (folder / "ready").exists():
            time.sleep(0.01)

    def restart(self, number):
        self.workers[number] = forked(self._work, number)

    def over(self):
        """Waits until everybody has ended well, but for servers that were killed."""
        (self.folder / "until").touch()
        for number, process in self.workers.items():
            assert os.waitpid(process, 0)[1] == 0, f"worker {number} failed"
        self.workers.clear()
        (self.folder / "over").touch()
        assert os.waitpid(self.judge, 0)[1] == 0
        self.judge = None
        assert [os.waitpid(process, 0)[1] for process in self.servers] == [0] * len(self.servers)
        self.servers.clear()

    def end(self):
        for process in (*self.servers, *self.workers.values(), *([] if self.judge is None else [self.judge])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    # ------------------------------------------------------------------ in the processes

    def _serve(self, shard, shards, replicate):
        options = {"number": shard, "shards": shards, "folder": self.folder, "replicate": replicate}
        serve(KAsync(1), self.count + 1, told=lambda text: None, **options)

    def _server(self, number):
        self.weight = nn.Parameter(torch.zeros(ELEMENTS))
        return ParameterServer(
            [self.weight], lambda given: torch.optim.SGD(given, lr=1.0), servers=self.folder, worker=number
        )

    def _work(self, number):
        """Counts what was acknowledged in a file that only grows."""
        server, weight = self._server(number), self.weight
        acknowledged = os.open(self.folder / f"acknowledged-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        while server.pull() and not (self.folder / "until").exists():
            assert bool((weight <= -server.version).all()), "it is as new as it says, or newer on some shard"
            weight.grad = torch.ones(ELEMENTS)
            server.push()
            os.write(acknowledged, b".")
        server.close()

    def _judge(self):
        """What the values are in the end, and what the servers say."""
        server, weight = self._server(self.count), self.weight
        (self.folder / "ready").touch()
        while not (self.folder / "over").exists():
            server.sleep(0.02)
        report = server.report()
        server.worker.pull(server.worker.targets(server.parameters), report.updates)
        acknowledged = sum((self.folder / f"acknowledged-{number}").stat().st_size for number in range(self.count))
        applied = sum(report.applied.values())
        print(
            f"{report.updates} updates, {applied} gradients, {acknowledged} acknowledged, weight {weight[0].item():.0f}"
        )
        assert applied == report.updates == -weight[0].item(), (report, weight[0])
        assert bool((weight == weight[0]).all())
        # A worker may be killed after its gradient was acknowledged and before it counted that.
        assert acknowledged <= applied
        server.close()
