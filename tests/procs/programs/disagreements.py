"""All the ways to disagree, each on fresh connections, on every path."""

import dataclasses
import itertools
import re
import time

import torch
from torch import nn

import ringred
from ringred.errors import CollectiveMismatch, CollectiveTimeout, PeerFailed, RingredError
from ringred.runtime.config import detect_launch


def connecting(world):
    """What connects the ranks of `world` anew, with a timeout: by MPI, or by the store that torchrun serves."""
    if detect_launch().kind == "mpi":
        from mpi4py import MPI

        group = MPI.COMM_WORLD.Get_group().Incl(list(range(world.size)))
        ranks = MPI.COMM_WORLD.Create_group(group)
        return lambda timeout: ringred.Communicator.from_mpi(ranks, config=config_of(world, timeout))

    import torch.distributed as dist

    from ringred.transports.stores import rendezvous

    store, numbers = rendezvous(60, "disagreements"), itertools.count()

    def fresh(timeout):
        part = dist.PrefixStore(f"case/{next(numbers)}", store)
        return ringred.Communicator.from_store(part, world.rank, world.size, config=config_of(world, timeout))

    return fresh


def config_of(world, timeout):
    return dataclasses.replace(world.config, timeout=timeout)


def backward(comm, action):
    model = ringred.DistributedDataParallel(nn.Linear(4, 2), process_group=comm)
    output = model(torch.ones(3, 4))
    output.register_hook(lambda gradient: action() and None)
    output.sum().backward()


def on_path(comm, path, tensor, op="sum", **options):
    if path == "sync":
        comm.all_reduce(tensor, op, **options)
    elif path == "async":
        comm.all_reduce(tensor, op, async_op=True, **options).wait()
    else:
        backward(comm, lambda: comm.all_reduce(tensor, op, **options))


def case(comm, path, what):
    odd = comm.rank == 1
    if what == "shape":
        # The odd one's message is far longer: it must not be written behind anybody's buffer.
        on_path(comm, path, torch.ones(1_000_000 if odd else 9), algorithm="ring")
    elif what == "dtype":
        on_path(comm, path, torch.ones(9, dtype=torch.int32 if odd else torch.float32))
    elif what == "op":
        on_path(comm, path, torch.ones(9), "max" if odd else "sum")
    elif what == "collective":
        if odd:
            comm.broadcast(torch.ones(9), 1)
            comm.barrier()
        else:
            on_path(comm, path, torch.ones(9))
    elif what == "native":
        comm.all_reduce(torch.ones(9), "max" if odd else "sum", algorithm="native")
    elif what == "roots":
        comm.broadcast(torch.ones(9), comm.rank)
        comm.barrier()
        comm.barrier()
    elif what == "one way":
        if comm.rank == 0:
            comm.broadcast(torch.ones(9), 0)
            comm.close()
        else:
            comm.all_reduce(torch.ones(9))
    elif what == "late":
        if odd:
            time.sleep(1.8)
        on_path(comm, path, torch.ones(9))
    elif what == "raises":
        if odd:
            failure = ZeroDivisionError("no batch left")
            comm.abort(failure)
            raise failure
        on_path(comm, path, torch.ones(9))


def check_raised(comm, what, path, error, took):
    """Raises unless `error` is what this rank had to raise, in time."""
    text = str(error)
    if what == "roots":  # all three disagree: the message must name the two ends of what was left over, and the call
        found = re.search(r"rank ([0-2]) got from rank ([0-2]) what it did not expect: ", text)
        kind, words = CollectiveMismatch, "barrier #"
        if found is None or found[1] == found[2]:
            raise AssertionError(f"rank {comm.rank}, roots: no two ends are named in {error!r}")
    elif what == "one way":
        kind, words = CollectiveMismatch, "rank 0 broadcast #2"
    elif what in ("shape", "dtype", "op", "collective", "native"):
        kind, words = CollectiveMismatch, "rank 1"
    elif comm.rank == 1:
        kind, words = (ZeroDivisionError, "no batch") if what == "raises" else (RingredError, "")
    elif what == "late":
        kind, words = CollectiveTimeout, "rank 1 did not take part"
    else:
        kind, words = PeerFailed, "rank 1 raised ZeroDivisionError: no batch left"
    if not isinstance(error, kind) or words not in text or took > 5:
        raise AssertionError(f"rank {comm.rank}, {what} on the {path} path, after {took:.1f} s: {error!r}")


CASES = [
    (path, what)
    for path in ("sync", "async", "backward")
    for what in ("shape", "dtype", "op", "collective", "late", "raises")
]


def check(world):
    """How many cases raised on this rank what they had to."""
    fresh, cases = connecting(world), [*CASES, ("sync", "one way")]
    by_mpi = detect_launch().kind == "mpi"
    if by_mpi or world.transport.name == "shm":
        # Small messages are sent and forgotten, so that each rank believes that it was the root: the next call tells.
        cases += [("sync", "roots")]
    if by_mpi:
        cases += [("sync", "native")]
    for path, what in cases:
        comm = fresh(1.0 if what == "late" else 8.0)
        comm.barrier()
        began, raised = time.monotonic(), None
        try:
            case(comm, path, what)
        except (RingredError, ZeroDivisionError) as error:
            raised = error
        check_raised(comm, what, path, raised, time.monotonic() - began)
        comm.close()
        world.barrier()
    return len(cases)
