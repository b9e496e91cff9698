"""One rank of one system under test: started by `all_reduce.py`, told what to time over a socket.

    python benchmarks/peers.py SYSTEM SOCKET BARRIER SIZE [RANK]

It imports no more than its system needs, so that a peer may live in an environment of its own.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], None]


class Barrier:
    """A barrier of all ranks of a system over a file that they map: the same one for every system.

    It spins, so that all leave within a microsecond; where ranks share a core it yields.
    """

    def __init__(self, path: str, rank: int, size: int, yields: bool) -> None:
        self.words = memoryview(mmap.mmap(os.open(path, os.O_RDWR), 64 * size)).cast("Q")
        self.rank, self.size, self.yields, self.turn = rank, size, yields, 0

    def wait(self) -> None:
        self.turn += 1
        self.words[8 * self.rank] = self.turn
        for peer in range(self.size):
            while self.words[8 * peer] < self.turn:
                if self.yields:
                    os.sched_yield()


class System:
    """Base class: a rank's number, the number of ranks, how to allocate. `prepare` returns the call to time."""

    label = "limit"
    memories = ("tensor",)

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def empty(self, elements: int, dtype: Any, memory: str) -> Any:
        import torch

        return torch.empty(elements, dtype=dtype)

    def prepare(self, collective: str, algorithm: str, memory: str, buffer: Any, spare: Any) -> Call:
        """The call: all-reduces `buffer`, all-gathers into it, reduce-scatters it or exchanges it into `spare`, ..."""
        raise NotImplementedError

    def describe(self, buffer: Any, collective: str, algorithm: str) -> tuple[str, str]:
        """The algorithm and the transport that a call uses, as far as the system says."""
        return "", ""

    def settings(self) -> str:
        """Settings that matter to it."""
        return ""

    def close(self) -> None:
        """Ends it in order."""


class Limit(System):
    """No communication: every rank streams the traffic of the collective through its own memory, at once.

    A bandwidth-optimal all-reduce of N bytes makes each rank read N and write N bytes; so does a copy of N.
    """

    def prepare(self, collective: str, algorithm: str, memory: str, buffer: Any, spare: Any) -> Call:
        source = buffer.clone().zero_()
        return lambda: buffer.copy_(source)


class Ringred(System):
    label = "ringred"
    memories = ("window", "tensor")

    def __init__(self, rank: int, size: int) -> None:
        import ringred

        self.comm = ringred.init()
        super().__init__(self.comm.rank, self.comm.size)

    def empty(self, elements: int, dtype: Any, memory: str) -> Any:
        return self.comm.empty(elements, dtype) if memory == "window" else super().empty(elements, dtype, memory)

    def prepare(self, collective: str, algorithm: str, memory: str, buffer: Any, spare: Any) -> Call:
        comm, share = self.comm, buffer.numel() // self.size
        mine = buffer[self.rank * share : (self.rank + 1) * share]
        calls: dict[str, Call] = {
            "all_reduce": lambda: comm.all_reduce(buffer, algorithm=algorithm),
            "reduce_scatter": lambda: comm.reduce_scatter(spare, buffer, algorithm=algorithm),
            "all_gather": lambda: comm.all_gather(buffer, mine, algorithm=algorithm),
            "broadcast": lambda: comm.broadcast(buffer, 0, algorithm=algorithm),
            "all_to_all": lambda: comm.all_to_all(spare, buffer),
        }
        return calls[collective]

    def describe(self, buffer: Any, collective: str, algorithm: str) -> tuple[str, str]:
        if algorithm == "auto":
            memory = self.comm.memory_of(buffer)
            algorithm = self.comm.choice(buffer.nbytes, collective, memory)
        return algorithm, self.comm.transport.name

    def close(self) -> None:
        self.comm.close()


class Gloo(System):
    """torch.distributed on its own backend for CPU tensors."""

    label = backend = "gloo"

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        import torch.distributed as dist

        dist.init_process_group(self.backend)

    def prepare(self, collective: str, algorithm: str, memory: str, buffer: Any, spare: Any) -> Call:
        import torch.distributed as dist

        share = buffer.numel() // self.size
        mine = buffer[self.rank * share : (self.rank + 1) * share]
        calls: dict[str, Call] = {
            "all_reduce": lambda: dist.all_reduce(buffer),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(spare, buffer),
            "all_gather": lambda: dist.all_gather_into_tensor(buffer, mine),
            "broadcast": lambda: dist.broadcast(buffer, 0),
            "all_to_all": lambda: dist.all_to_all_single(spare, buffer),
        }
        return calls[collective]

    def describe(self, buffer: Any, collective: str, algorithm: str) -> tuple[str, str]:
        return "", "tcp"

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class TorchOnRingred(Gloo):
    """torch.distributed on ringred."""

    label, backend = "torch on ringred", "ringred"

    def describe(self, buffer: Any, collective: str, algorithm: str) -> tuple[str, str]:
        import torch.distributed as dist

        comm: Any = dist.group.WORLD.comm
        return comm.choice(buffer.nbytes, collective, comm.memory_of(buffer)), comm.transport.name


class Mpi(System):
    """mpi4py's own collectives, in place, on whichever MPI there is."""

    label = "mpi"

    def __init__(self, rank: int, size: int) -> None:
        from mpi4py import MPI

        self.mpi = MPI
        super().__init__(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size())
        if self.size != size:
            raise RuntimeError(f"mpirun started {size} ranks, but mpi4py's MPI sees {self.size}")
        self.label = (
            " ".join(
                str(MPI.Get_library_version()).split("\n")[0].strip("\0 ").replace("(R)", "").split(",")[0].split()
            )
            .replace(" Version:", "")
            .replace(" Library", "")
        )

    def prepare(self, collective: str, algorithm: str, memory: str, buffer: Any, spare: Any) -> Call:
        import torch

        types = {
            torch.float32: self.mpi.FLOAT,
            torch.float64: self.mpi.DOUBLE,
            torch.int32: self.mpi.INT32_T,
            torch.int64: self.mpi.INT64_T,
        }
        if buffer.dtype not in types:
            raise NotImplementedError(f"MPI does not reduce {buffer.dtype}")
        world, kind = self.mpi.COMM_WORLD, types[buffer.dtype]
        whole, part = [buffer.numpy(), kind], [spare.numpy(), kind]
        calls: dict[str, Call] = {
            "all_reduce": lambda: world.Allreduce(self.mpi.IN_PLACE, whole),
            "reduce_scatter": lambda: world.Reduce_scatter_block(whole, part),
            "all_gather": lambda: world.Allgather(self.mpi.IN_PLACE, whole),
            "broadcast": lambda: world.Bcast(whole, 0),
            "all_to_all": lambda: world.Alltoall(whole, part),
        }
        return calls[collective]

    def settings(self) -> str:
        chosen = json.loads(os.environ.get("RINGRED_BENCH_SETTINGS", "{}"))
        return " ".join(f"{name}={value}" for name, value in sorted(chosen.items()))


class DeepSpeed(System):
    """DeepSpeed's C++ all-reduce over shared memory."""

    label = "deepspeed"

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        from deepspeed.ops.op_builder import ShareMemCommBuilder

        self.operations = ShareMemCommBuilder().load(verbose=False)
        self.operations.initialize(size, rank)

    def prepare(self, collective: str, algorithm: str, memory: str, buffer: Any, spare: Any) -> Call:
        import torch

        if collective != "all_reduce":
            raise NotImplementedError("DeepSpeed's shared memory reduces only")
        reduce = torch.ops.deepspeed.inference_all_reduce_
        return lambda: reduce(buffer)

    def describe(self, buffer: Any, collective: str, algorithm: str) -> tuple[str, str]:
        return "", "/dev/shm"


SYSTEMS: dict[str, type[System]] = {
    "limit": Limit,
    "ringred": Ringred,
    "gloo": Gloo,
    "torch": TorchOnRingred,
    "mpi": Mpi,
    "deepspeed": DeepSpeed,
}


class Trial:
    """One collective of one size on one system: writes, waits, calls and reads, again and again."""

    def __init__(self, system: System, barrier: Barrier, order: dict[str, Any]) -> None:
        import torch

        self.system, self.barrier, self.order = system, barrier, order
        self.collective = order["collective"]
        dtype = getattr(torch, order["dtype"])
        # For collectives with one share per rank, a multiple of the number of ranks.
        shares = self.collective in ("reduce_scatter", "all_gather", "all_to_all")
        elements = max(1, order["bytes"] // dtype.itemsize)
        if shares:
            elements = -(-elements // system.size) * system.size
        self.buffer = system.empty(elements, dtype, order["memory"])
        spare = {"reduce_scatter": elements // system.size, "all_to_all": elements}.get(self.collective, 0)
        self.spare = system.empty(spare, dtype, order["memory"])
        # Small whole numbers: every dtype adds them exactly.
        self.base = (torch.arange(elements) % 7).to(dtype)
        self.call = system.prepare(self.collective, order["algorithm"], order["memory"], self.buffer, self.spare)
        self.elements = elements
        self.expected, self.differs = torch.empty_like(self.base), torch.empty(elements, dtype=torch.bool)

    def run(self, iterations: int, turn: int) -> dict[str, Any]:
        import torch

        calls, wholes, wrong = [], [], 0
        for index in range(turn, turn + iterations):
            added = (index + self.system.rank) % 4
            began = time.perf_counter()
            torch.add(self.base, added, out=self.buffer)
            written = time.perf_counter()
            self.barrier.wait()
            start = time.perf_counter()
            self.call()
            end = time.perf_counter()
            wrong += self.check(index)
            read = time.perf_counter()
            calls.append(end - start)
            wholes.append(written - began + read - start)
        return {"calls": calls, "wholes": wholes, "wrong": wrong}

    def check(self, index: int) -> int:
        """Reads the result, as an optimizer does, and returns the number of wrong elements."""
        import torch

        size, rank = self.system.size, self.system.rank
        added = [(index + peer) % 4 for peer in range(size)]
        share = self.elements // size
        if self.system.label == "limit":
            return 0 if torch.ne(self.buffer, 0, out=self.differs).count_nonzero() == 0 else 1
        if self.collective == "all_reduce":
            return self.wrong(self.buffer, self.base, size, sum(added))
        if self.collective == "broadcast":
            return self.wrong(self.buffer, self.base, 1, added[0])
        if self.collective == "reduce_scatter":
            return self.wrong(self.spare, self.base[rank * share : (rank + 1) * share], size, sum(added))
        shares = [slice(peer * share, (peer + 1) * share) for peer in range(size)]
        if self.collective == "all_to_all":
            mine = self.base[shares[rank]]
            return sum(self.wrong(self.spare[s], mine, 1, added[peer]) for peer, s in enumerate(shares))
        return sum(self.wrong(self.buffer[s], self.base[s], 1, added[peer]) for peer, s in enumerate(shares))

    def wrong(self, found: Any, base: Any, factor: int, added: int) -> int:
        """How many elements of `found` are not base·factor + added. It allocates nothing."""
        import torch

        expected, differs = self.expected[: found.numel()], self.differs[: found.numel()]
        torch.mul(base, factor, out=expected)
        expected.add_(added)
        return int(torch.ne(found, expected, out=differs).count_nonzero())


def main() -> None:
    name, path, barrier_path, size, *rest = sys.argv[1:]
    rank = int(rest[0]) if rest else -1
    cores = sorted(os.sched_getaffinity(0))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    lines = connection.makefile("rw")

    def say(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    # MPI gives the rank only after its start, but its threads must start pinned: read it from the environment.
    guess = next(
        (int(os.environ[k]) for k in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK") if k in os.environ), rank
    )
    os.sched_setaffinity(0, {cores[max(guess, 0) % len(cores)]})
    try:
        system = SYSTEMS[name](rank, int(size))
    except (ImportError, RuntimeError, OSError) as failure:
        say({"absent": f"{type(failure).__name__}: {failure}"[:300]})
        return
    barrier = Barrier(barrier_path, system.rank, system.size, system.size > len(cores))
    say({"rank": system.rank, "label": system.label, "memories": system.memories, "settings": system.settings()})
    trials: dict[str, Trial] = {}
    for line in lines:
        order = json.loads(line)
        if order.get("end"):
            break
        key = json.dumps({k: v for k, v in order.items() if k not in ("iterations", "turn")}, sort_keys=True)
        try:
            if key not in trials:
                if any(trial.order["bytes"] != order["bytes"] for trial in trials.values()):
                    trials.clear()  # one size at a time: large buffers do not pile up
                trials[key] = Trial(system, barrier, order)
                trials[key].run(order["warm_up"], 0)
            trial = trials[key]
            result = trial.run(order["iterations"], order["turn"])
            result["algorithm"], result["transport"] = system.describe(
                trial.buffer, order["collective"], order["algorithm"]
            )
            say(result)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as failure:
            say({"unsupported": f"{type(failure).__name__}: {failure}"[:300]})
    system.close()


if __name__ == "__main__":
    main()
