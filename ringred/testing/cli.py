"""The `ringred` command: verify, explain, topology, serve, keys, run, meet, status, doctor."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from ringred.collectives.registry import COLLECTIVES, algorithms, groups, lookup, prove
from ringred.errors import RingredError
from ringred.runtime.config import mpirun_environment
from ringred.runtime.select import candidates, predict, segments_for, share_bounds
from ringred.schedule import closed_forms
from ringred.schedule.draw import draw
from ringred.testing.run_command import add_run
from ringred.testing.status_command import add_status
from ringred.topology.detect import machine
from ringred.topology.gpus import gpus
from ringred.topology.model import flat
from ringred.topology.torus import near_square

if TYPE_CHECKING:
    from ringred.communicator import Communicator

__all__ = ["main"]

_FAST = 100e6  # bytes per second that encryption should do
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (RingredError, ValueError, OSError) as failure:
        print(f"ringred: {failure}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ringred", description="Collective algorithms: proved, priced and drawn.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    verify = commands.add_parser("verify", help="prove every schedule on every number of ranks and every grid")
    verify.add_argument("--max-ranks", type=_count, default=17, metavar="N", help="1 to N ranks (default 17)")
    verify.set_defaults(command=_verify)

    explain = commands.add_parser("explain", help="steps, messages, bytes and predicted time of a collective")
    explain.add_argument("collective", choices=COLLECTIVES)
    explain.add_argument("--ranks", type=_count, required=True, metavar="N")
    explain.add_argument("--bytes", type=_size, required=True, metavar="SIZE", help="such as 4, 64K, 25M, 1G")
    explain.add_argument("--algorithm", metavar="NAME", help="one of them; all, without drawing, where left out")
    explain.add_argument("--grid", type=_grid, metavar="XxY", help="such as 4x3, X innermost")
    explain.add_argument("--alpha", type=float, default=20e-6, metavar="S", help="seconds a message (default 20e-6)")
    explain.add_argument("--beta", type=float, default=0.32e-9, metavar="S", help="seconds a byte (default 0.32e-9)")
    explain.add_argument("--gamma", type=float, default=0.1e-9, metavar="S", help="seconds a reduced byte (0.1e-9)")
    explain.set_defaults(command=_explain)

    topology = commands.add_parser("topology", help="what this machine is")
    topology.set_defaults(command=_topology)

    serve = commands.add_parser("serve", help="host a shard of a parameter server, in a process of its own")
    serve.add_argument("--workers", type=_count, required=True, metavar="P", help="how many workers there will be")
    serve.add_argument("--policy", default="async", help="sync, async, or with a number k_async:3, soft_sync:1, ...")
    serve.add_argument("--elastic", action="store_true", help="go on with fewer workers than the policy asks for")
    serve.add_argument("--updates", type=_count, metavar="N", help="the training is over after so many updates")
    serve.add_argument("--staleness-aware", choices=("mean", "per_gradient"), help="smaller steps for old gradients")
    serve.add_argument("--shards", type=_count, default=1, metavar="S", help="servers in all (default 1)")
    serve.add_argument("--number", type=int, default=0, metavar="K", help="which of them this is, 0 to S - 1")
    serve.add_argument("--replicate", action="store_true", help="keep a copy of each server on the next one")
    serve.add_argument("--ranks-per-host", type=_count, default=1, metavar="L", help="of workers that are whole hosts")
    serve.add_argument("--snapshots", type=Path, metavar="D", help="a folder of snapshots; goes on from the newest one")
    serve.add_argument("--every", type=_count, metavar="N", help="write a snapshot after each N updates")
    serve.add_argument("--folder", type=Path, help="where servers and workers meet, if all see one file system")
    serve.add_argument("--addresses", default="", metavar="A,B", help="else all servers, such as tcp://10.0.0.1:7000")
    serve.add_argument("--listen", metavar="A", help="the address to listen on, if it is not the one that others use")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="the job's keys; without --folder")
    serve.set_defaults(command=_serve)

    keys = commands.add_parser("keys", help="make the keys of a job of a parameter server")
    keys.add_argument("file", type=Path, help="a new file, which only its owner can read")
    keys.set_defaults(command=_keys)

    add_run(commands)
    add_status(commands)

    doctor = commands.add_parser("doctor", help="check what ringred needs here, and say how to mend it")
    doctor.set_defaults(command=_doctor)
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number ≥ 1, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in _UNITS or not number.isdigit():
        raise argparse.ArgumentTypeError(f"expected a size such as 4, 64K, 25M or 1G, got {text!r}")
    return int(number) * _UNITS[unit]


def _grid(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected a grid such as 4x3, got {text!r}")
    return tuple(int(part) for part in parts)


# ---------------------------------------------------------------------- verify


def _verify(options: argparse.Namespace) -> int:
    began = time.monotonic()
    rows, total = [], 0
    for collective in COLLECTIVES:
        for name, entry in sorted(algorithms(collective).items()):
            if entry.native:
                continue
            proofs = [prove(entry, group) for size in range(1, options.max_ranks + 1) for group in groups(entry, size)]
            total += len(proofs)
            ordered = "yes" if all(proof.rank_ordered for proof in proofs) else ""
            rows.append((collective, name, len(proofs), ordered, entry.summary))
    print(tabulate(rows, headers=["collective", "algorithm", "proved", "in rank order", ""]))
    print(f"\n{total} schedules proved on 1 to {options.max_ranks} ranks in {time.monotonic() - began:.1f} s")
    return 0


# ---------------------------------------------------------------------- explain


def _explain(options: argparse.Namespace) -> int:
    model = flat(options.ranks, options.alpha, options.beta, options.gamma)
    head = f"{options.collective} of {options.bytes} bytes on {options.ranks} ranks"
    costs = f"α = {options.alpha:g} s, β = {options.beta:g} s/B, γ = {options.gamma:g} s/B"
    if options.algorithm is None:
        if options.grid is not None:
            raise ValueError("explain: --grid needs --algorithm")
        found = candidates(options.collective, options.ranks, options.bytes, model)
        rows = [(c.name, "x".join(map(str, c.grid)) if c.grid else "", f"{c.seconds * 1e3:.3f}") for c in found]
        print(f"{head}; {costs}\n{tabulate(rows, headers=['algorithm', 'grid', 'predicted ms'])}")
        return 0
    entry = lookup(options.collective, options.algorithm)
    if entry.native:
        raise ValueError(f"explain: {options.algorithm!r} is the library's own; its steps are not known")
    group = entry.group(options.ranks, 0, options.grid, segments_for(options.bytes, 1 << 20))
    proof = prove(entry, group)
    bounds = share_bounds(options.bytes, entry.units(group))
    cost = predict(entry, group, options.bytes, model)
    form = None
    if options.collective == "all_reduce":
        links = ((options.alpha, options.beta),) * len(group.grid or (1,))
        form = closed_forms.all_reduce(entry.name, group, options.bytes, links, options.gamma)
    table: list[tuple[str, object, object]] = [
        ("messages sent by the busiest rank", cost.messages, "" if form is None else form.messages),
        (
            "bytes sent by the busiest rank",
            cost.bytes_sent,
            "" if form is None else f"{form.data_sent * bounds[-1][1]:.0f}",
        ),
        ("bytes received by the busiest rank", cost.bytes_received, ""),
        ("predicted ms", f"{cost.seconds * 1e3:.3f}", "" if form is None else f"{form.seconds * 1e3:.3f}"),
    ]
    print(f"{head} by {entry.name} ({group}), {entry.summary}\n{costs}; proved, {max(proof.steps)} steps")
    print(
        tabulate(
            table, headers=["", "schedule", "closed form"], disable_numparse=True, colalign=("left", "right", "right")
        )
    )
    print(f"\n{draw(group.size, entry.steps(group))}")
    return 0


# ---------------------------------------------------------------------- parameter servers


def _serve(options: argparse.Namespace) -> int:
    from ringred.parameter_server.keys import load_keys
    from ringred.parameter_server.policies import parse
    from ringred.parameter_server.serving import serve

    return serve(
        parse(options.policy, elastic=options.elastic),
        options.workers,
        number=options.number,
        shards=options.shards,
        folder=options.folder,
        addresses=[address for address in options.addresses.split(",") if address],
        listen=options.listen,
        keys=None if options.keys is None else load_keys(options.keys),
        updates=options.updates,
        staleness_aware=options.staleness_aware,
        replicate=options.replicate,
        snapshots=options.snapshots,
        every=options.every,
        ranks_per_host=options.ranks_per_host,
        told=lambda text: print(text, flush=True),
    )


def _keys(options: argparse.Namespace) -> int:
    from ringred.parameter_server.keys import make_keys, save_keys

    save_keys(make_keys(), options.file)
    return 0


# ---------------------------------------------------------------------- topology and doctor


def _topology(options: argparse.Namespace) -> int:
    here = machine()
    rows = [
        ("host", here.host),
        ("processor", here.processor),
        ("cores this process may use", here.usable_cores),
        ("cores", here.cores),
        ("sockets", here.sockets),
        ("memory", f"{here.memory_bytes / 2**30:.1f} GiB"),
        ("grid of one rank a core", "x".join(map(str, near_square(here.usable_cores)))),
    ]
    print(tabulate(rows, tablefmt="plain", disable_numparse=True))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    checks = [
        _check_torch,
        _check_machine,
        _check_mpi,
        _check_threads,
        _check_memory,
        _check_player,
        _check_gloo,
        _check_encryption,
        *([_check_cuda] if _has_nvidia() else []),
    ]
    results = [check() for check in checks]
    print(tabulate([(("ok" if good else "FAILED"), what, remedy) for good, what, remedy in results], tablefmt="plain"))
    failed = [what for good, what, _ in results if not good]
    print(f"\n{'all well' if not failed else f'{len(failed)} of {len(results)} checks failed'}")
    return 1 if failed else 0


def _check_torch() -> tuple[bool, str, str]:
    import torch

    return True, f"torch {torch.__version__}", ""


def _check_machine() -> tuple[bool, str, str]:
    here = machine()
    return True, f"{here.usable_cores} of {here.cores} cores, {here.sockets} socket(s), {here.processor}", ""


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _check_cuda() -> tuple[bool, str, str]:
    from ringred.transports.cuda import cupy_driver

    reason = cupy_driver.unavailable()
    if reason is not None:
        return False, f"CUDA IPC (experimental): {reason}", "without it, tensors of a GPU are refused"
    import torch

    devices = torch.cuda.device_count()
    lacking = {index: cupy_driver.unavailable(index) for index in range(devices)}
    pairs = [(one, other) for one in range(devices) for other in range(devices) if one != other]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    troubles = [f"device {index}: {why}" for index, why in lacking.items() if why is not None]
    troubles += [f"device {one} does not reach the memory of device {other}" for one, other in apart[:3]]
    if troubles:
        return False, f"CUDA IPC (experimental): {'; '.join(troubles)}", "CUDA_VISIBLE_DEVICES leaves devices out"
    found = gpus()
    told = [f"{devices} device(s)"] if found is None else [str(gpu) for gpu in found]
    return True, "CUDA IPC (experimental): " + "\n".join([*told, "`make gpu-check` tries it"]), ""


_MPI_SELF_TEST = """
import torch, ringred
comm, data = ringred.init(), torch.ones(1000)
from ringred.transports import mpi
comm.all_reduce(data, algorithm="ring")
assert data.sum() == 2000, f"wrong sum: {data.sum()}"
print(mpi.library() if comm.rank == 0 else "", end="")
"""


def _check_mpi() -> tuple[bool, str, str]:
    remedy = "pip install 'ringred[mpi]' brings mpi4py and an MPI; torchrun works without"
    beside = os.path.dirname(sys.executable)  # finds the mpirun of a virtual environment that is not activated
    mpirun = shutil.which("mpirun") or shutil.which("mpirun", path=beside)
    if mpirun is None:
        return False, "MPI: no mpirun on PATH", remedy
    if importlib.util.find_spec("mpi4py") is None:
        return False, f"MPI: {mpirun}, and no mpi4py", remedy
    command = [mpirun, "-n", "2", sys.executable, "-c", _MPI_SELF_TEST]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=mpirun_environment()
        )
    except subprocess.TimeoutExpired:
        return False, f"MPI: {mpirun}: two ranks did not end within 60 s", "is another MPI's mpirun on the PATH?"
    said = [line.strip("\0 ") for line in (found.stdout + found.stderr).splitlines() if line.strip("\0 -")]
    if found.returncode:
        return False, f"MPI: {mpirun}: {next((s for s in said if 'Error' in s), said[0] if said else '')}", remedy
    return True, f"MPI: a ring all-reduce on two ranks by {mpirun} ({said[0] if said else ''})", ""


def _self_test(transport: str) -> None:
    import torch

    from ringred.testing.ranks import run_ranks

    def reduce(comm: Communicator) -> float:
        data = torch.ones(1000)
        comm.all_reduce(data, algorithm="ring")
        return float(data.sum())

    results = run_ranks(reduce, 2, transport, timeout=20)
    if results != [2000.0, 2000.0]:
        raise RingredError(f"wrong sum: expected 2000 on both ranks, got {results}")


def _checked(what: str, transport: str, remedy: str) -> tuple[bool, str, str]:
    try:
        _self_test(transport)
    except (RingredError, RuntimeError, OSError) as failure:
        return False, f"{what}: {failure}", remedy
    return True, f"{what}: a ring all-reduce on two ranks", ""


def _check_threads() -> tuple[bool, str, str]:
    return _checked("threads", "local", "this should work everywhere: please report it")


def _check_memory() -> tuple[bool, str, str]:
    return _checked("shared memory", "shm", "ranks of this host go by MPI or Gloo instead, which is slower")


def _check_player() -> tuple[bool, str, str]:
    from ringred.transports.shm_player import engine, unusable

    why = unusable()
    if why is None:
        return True, f"collectives on shared memory are run by {engine(True)}", ""
    remedy = (
        "short calls take 10 µs instead of 3: install ringred again, with a C compiler or after pip install ziglang"
    )
    return True, f"collectives on shared memory are run by {engine(None)}", remedy


def _check_gloo() -> tuple[bool, str, str]:
    return _checked("Gloo over the loopback", "torch_p2p", "is the loopback interface up, and not filtered?")


def _check_encryption() -> tuple[bool, str, str]:
    from ringred.parameter_server.keys import encryption_rate

    try:
        rate = encryption_rate()
    except RingredError as failure:
        return False, f"encryption of a parameter server's messages: {failure}", ""
    remedy = "this pyzmq brings a slow libsodium: apt install libsodium23, and start with LD_PRELOAD=libsodium.so.23"
    return (
        True,
        f"encryption of a parameter server's messages between hosts: {rate / 1e6:.0f} MB/s",
        "" if rate > _FAST else remedy,
    )


if __name__ == "__main__":
    sys.exit(main())
