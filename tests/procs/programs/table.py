"""One rank of the whole table; over MPI the conformance kit too."""

import torch

import ringred
from ringred.collectives.registry import algorithms
from ringred.runtime.config import detect_launch
from ringred.testing.conformance import BREAKING, CHECKS
from ringred.transports.base import Fault
from tests.table import check_all_reduce, check_others

comm = ringred.init()
reduced = check_all_reduce(comm)
others = check_others(comm)
kit = 0
by_mpi = detect_launch().kind == "mpi"


def fresh(name):
    """A transport like the communicator's, for one check."""
    if comm.transport.name == "mpi":
        from ringred.transports.mpi import MpiTransport, world

        return MpiTransport(world())
    return comm.transport.subset(range(comm.size), name)


if comm.transport.name in ("mpi", "shm"):
    for check in (*CHECKS.values(), *BREAKING.values()):
        transport = fresh(check.__name__)
        try:
            check(transport)
        except Fault as fault:
            raise AssertionError(f"{check.__name__} on rank {comm.rank}: {fault}") from fault
        except AssertionError as failure:
            raise AssertionError(f"{check.__name__} on rank {comm.rank}: {failure}") from failure
        transport.close()
        kit += 1
        comm.barrier()
if by_mpi:
    for op in ("sum", "avg", "max"):
        tensor = torch.arange(1000.0) * comm.size
        comm.all_reduce(tensor, op, algorithm="native")
        assert torch.equal(tensor, torch.arange(1000.0) * comm.size * (comm.size if op == "sum" else 1)), op
assert len(algorithms("all_reduce")) == 10
comm.barrier()
if comm.rank == 0:
    print(f"table: {comm.transport.name} {comm.size} ranks, {reduced} all-reduces, {others} others, {kit} checks")
