"""Ranks that do not do the same on the backend "ringred": each fault is told, and the process lives on."""

import sys
import time
import warnings
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import ringred
from ringred.torch_backend.group import monitored_barrier


def raises(kind, words, action):
    began, told = time.monotonic(), None
    try:
        action()
    except kind as error:
        told = str(error)
    assert told is not None, f"expected {kind.__name__} about {words}"
    assert all(word in told for word in words), f"{words} are not all in {told}"
    return time.monotonic() - began


def main():
    warnings.simplefilter("ignore")
    dist.init_process_group("ringred", timeout=timedelta(seconds=20))
    rank = dist.get_rank()

    def group(seconds=20):
        return dist.new_group(timeout=timedelta(seconds=seconds))

    one = group()
    raises(ringred.CollectiveMismatch, ["rank 0", "rank 1"], lambda: dist.all_reduce(torch.ones(3 + rank), group=one))
    raises(RuntimeError, ["unusable", "earlier failure"], lambda: dist.all_reduce(torch.ones(3), group=one))

    two = group()
    work = dist.all_reduce(torch.ones(3 + rank), group=two, async_op=True)
    raises(ringred.CollectiveMismatch, ["rank 0", "rank 1"], work.wait)
    assert isinstance(work.exception(), ringred.CollectiveMismatch)
    assert not work.is_success()
    raises(RuntimeError, ["did not make the same call"], lambda: work.get_future().wait())

    three = group(seconds=1)
    if rank == 0:
        took = raises(ringred.CollectiveTimeout, ["rank 1 did not take part"], lambda: dist.barrier(group=three))
        assert 0.9 < took < 5
    dist.barrier()

    four = group()
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4), process_group=four)
    if rank == 0:  # the reducer's own all-reduce meets a broadcast
        raises(RuntimeError, ["did not make the same call"], lambda: model(torch.ones(2, 4)).sum().backward())
    else:
        raises(RuntimeError, ["did not make the same call"], lambda: dist.broadcast(torch.ones(2), 0, group=four))

    one_more = group()
    five = group(seconds=1)
    if rank == 0:
        raises(ringred.CollectiveTimeout, ["recv from rank 1, tag 5"], lambda: dist.recv(torch.ones(1), 1, five, tag=5))
    raises(ringred.UnsupportedTensor, ["rank", "CPU"], lambda: dist.all_reduce(torch.ones(3, device="meta")))
    if rank == 1:
        work = dist.irecv(torch.empty(1), 0)
        raises(NotImplementedError, ["wait() for it"], work.get_future)
        assert work.wait()
        assert work.wait()
        assert work.is_success()
    else:
        dist.send(torch.ones(1), 1)
    # As many callbacks as may wait for a collective keep its future from nothing.
    futures = [dist.all_reduce(torch.ones(1), async_op=True).get_future() for _ in range(80)]
    waiting = [
        future.then(lambda _: dist.all_reduce(torch.ones(1), group=one_more, async_op=True).get_future().wait())
        for future in futures
        if future.wait() is not None
    ]
    for future in waiting:
        future.wait()
    raises(ringred.UnsupportedTensor, ["send to rank", "contiguous"], lambda: dist.send(torch.ones(2, 3).t(), 1 - rank))
    one_value = torch.ones(1).expand(4) if rank == 0 else torch.zeros(4)
    dist.broadcast(one_value, 0)  # it is only read on rank 0
    assert one_value.tolist() == [1.0] * 4
    raises(ValueError, ["itself"], lambda: dist.group.WORLD.send([torch.ones(1)], rank, 0))
    if rank == 0:
        raises(
            RuntimeError,
            ["Rank 1 failed to pass monitoredBarrier", "missing: 1"],
            lambda: monitored_barrier(timeout=timedelta(seconds=0.3)),
        )
    dist.barrier()

    six = group()
    told = ["rank 1 raised ValueError: a bug of the user's"]
    if rank == 0:
        raises(ringred.PeerFailed, told, lambda: dist.all_reduce(torch.ones(3), group=six))
    with suppress(ValueError):
        try:
            if rank == 1:
                raise ValueError("a bug of the user's")
        finally:
            dist.destroy_process_group(six)
    dist.barrier()
    try:
        if rank == 1:
            raise ValueError("a bug of the user's")
        raises(ringred.PeerFailed, told, lambda: dist.all_reduce(torch.ones(3)))
    except ValueError:
        sys.excepthook(*sys.exc_info())  # as the interpreter does if nobody catches it
    dist.destroy_process_group()
    print("every fault was told\n", end="", flush=True)


if __name__ == "__main__":
    main()
