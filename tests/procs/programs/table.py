"""The whole table on the ranks of a communicator; over MPI and shared memory the conformance kit too."""

import torch

from ringred.collectives.registry import algorithms
from ringred.runtime.config import detect_launch
from ringred.testing import conformance, conformance_plans
from ringred.transports.base import Fault
from tests.table import check_all_reduce, check_others

KITS = (conformance, conformance_plans)
CONFORMANCE = [check for kit in KITS for table in (kit.CHECKS, kit.BREAKING) for check in table.values()]


def check(comm):
    """How many all-reduces, other collectives and checks of the kit were right."""
    reduced, others, kit = check_all_reduce(comm), check_others(comm), 0
    if comm.transport.name in ("mpi", "shm"):
        for one in CONFORMANCE:
            name = one.__name__
            transport = comm.transport.subset(range(comm.size), f"kit on {comm.size}: {name}")
            try:
                one(transport)
            except (Fault, AssertionError) as failure:
                raise AssertionError(f"{name} on rank {comm.rank}: {failure}") from failure
            transport.close()
            kit += 1
            comm.barrier()
    if detect_launch().kind == "mpi":
        for op in ("sum", "avg", "max"):
            tensor = torch.arange(1000.0) * comm.size
            comm.all_reduce(tensor, op, algorithm="native")
            assert torch.equal(tensor, torch.arange(1000.0) * comm.size * (comm.size if op == "sum" else 1)), op
    assert len(algorithms("all_reduce")) == 10
    comm.barrier()
    return {"all_reduces": reduced, "others": others, "kit": kit}
