"""A lane: runs jobs of several collectives each, one after the other, in parallel with a communicator's own calls."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

from ringred.communicator import Communicator
from ringred.errors import RingredError
from ringred.runtime.work import Progress, Work

__all__ = ["Lane"]

T = TypeVar("T")
_HOST = torch.device("cpu")


class Lane:
    """A thread and a duplicate of `comm`, on which jobs run in the order in which they were submitted.

    All ranks must submit matching jobs in the same order. A job may start any number of collectives on `self.comm`,
    wait for them and compute in between, while the program continues to use `comm`. Making a lane is collective.
    """

    def __init__(self, comm: Communicator, name: str) -> None:
        self.comm = comm.duplicate()
        self._name = f"rank {comm.rank}: {name}"
        self._progress = Progress(f"ringred-{name}-{comm.rank}")
        _threads.add(self._progress)
        weakref.finalize(self, _end, self._progress, self.comm).atexit = False  # it would start a thread too late

    def submit(self, job: Callable[[Communicator], T], purpose: str = "", device: torch.device = _HOST) -> Work[T]:
        """Runs `job` on the lane's communicator, after all jobs submitted before. If it raises, other ranks raise too.

        `purpose` is as in `Communicator.for_purpose`. Its tensors are on `device`: what the job and torch do there
        comes after what the program has enqueued by now, and the program goes on with the tensor that it returns.
        """
        comm = self.comm
        runner = comm.runner_on(device)
        ready = runner.device.here()
        work: Work[T] = Work(self._name)

        def done() -> T:
            try:
                with comm.for_purpose(purpose), runner.device.following(ready) as began:
                    made = job(comm)
                work.rest = runner.rest_of_job(ready, began, made, job)
                return made
            except BaseException as failure:
                comm.abort(failure)  # peers may be waiting in collectives that this rank will not reach
                raise

        if comm.size == 1 and device != _HOST:
            work.finish(done)  # on the program's own stream
        else:
            self._progress.submit(lambda: work.finish(done))
        return work


def _end(progress: Progress, comm: Communicator) -> None:
    """Closes a lane after its queued jobs, without waiting for them."""
    progress.submit(lambda: _close(comm))
    progress.submit(lambda: _threads.discard(progress))
    progress.let_end()


def _close(comm: Communicator) -> None:
    try:
        comm.close()
    except RingredError as failure:  # nobody waits for it, and the thread must go on to its end
        print(f"ringred: {failure}", file=sys.stderr, flush=True)


_threads: set[Progress] = set()


@atexit.register
def _join_all() -> None:
    """Joins all lanes' threads: a thread still inside torch when Python exits would abort the process. Their
    communicators are closed with all others."""
    for progress in list(_threads):
        progress.close()
