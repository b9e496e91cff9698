"""Process groups made in every way, among launchers' variables that mean another job; DDP must take them as they are.

Without an argument it starts three ranks of itself, as somebody does who has no launcher. The argument is a file for
each rank to find the others by, and ports.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import warnings

from ringred.testing.ports import reserved_port

RANKS = 3
BACKENDS = ("gloo", "ringred")
STRAYS = (
    {},
    {"WORLD_SIZE": "3"},
    {"RANK": "7", "WORLD_SIZE": "9"},
    {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"},
    {"PMI_RANK": "0", "PMI_SIZE": "2"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    {"RINGRED_TRANSPORT": "shm", "WORLD_SIZE": "9"},
    {"RINGRED_TRANSPORT": "torch_p2p"},
)


def of_file(folder, case, rank):
    return {"init_method": f"file://{folder}/{case}", "rank": rank, "world_size": RANKS}


def of_store(folder, case, rank):
    import torch.distributed as dist

    return {"store": dist.FileStore(f"{folder}/{case}", RANKS), "rank": rank, "world_size": RANKS}


def of_tcp(folder, case, rank):
    return {"init_method": f"tcp://127.0.0.1:{port(case)}", "rank": rank, "world_size": RANKS}


def of_environment(folder, case, rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port(case)))
    return {"init_method": "env://", "rank": rank, "world_size": RANKS}


HOWS = (of_file, of_store, of_tcp, of_environment)
# Both backends with every stray where variables tell of the job, and in turn elsewhere.
CASES = tuple(
    (how, backend, stray)
    for (at, how), (number, stray) in itertools.product(enumerate(HOWS), enumerate(STRAYS))
    for backend in (BACKENDS if how is of_environment else (BACKENDS[(at + number // 2) % 2],))
)


def port(case):
    return json.loads(sys.argv[3])[case]


def train(rank, ranks, **group):
    """A step whose gradient tells which ranks took part."""
    import torch

    import ringred

    model = ringred.DistributedDataParallel(torch.nn.Linear(3, 1), **group)
    model(torch.full((2, 3), float(rank))).sum().backward()
    wanted = torch.full((1, 3), 2.0 * sum(ranks) / len(ranks))
    assert torch.equal(model.module.weight.grad, wanted), model.module.weight.grad


def rank_main(folder, rank):
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    clean = dict(os.environ)
    for case, (how, backend, stray) in enumerate(CASES):
        number = RANKS - 1 - rank if case % 2 else rank  # each group has its own order
        os.environ.update(stray)
        dist.init_process_group(backend, **how(folder, case, number))
        train(number, range(RANKS))
        part = dist.new_group([0, 2])
        if number != 1:
            train(number, (0, 2), process_group=part)
        dist.barrier()
        dist.destroy_process_group()
        for name in os.environ.keys() - clean.keys():
            del os.environ[name]
        print(f"rank {rank}: {how.__name__} {backend} {stray}: right\n", end="", flush=True)


def start():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        ports = json.dumps([held.enter_context(reserved_port()) for _ in CASES])
        ranks = [
            subprocess.Popen([sys.executable, __file__, folder, str(rank), ports], env=os.environ)
            for rank in range(RANKS)
        ]
        statuses = [rank.wait() for rank in ranks]
    raise SystemExit(max(statuses, key=abs))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rank_main(sys.argv[1], int(sys.argv[2]))
    else:
        start()
