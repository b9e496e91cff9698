"""`ringred doctor` and `ringred topology`: what this machine is, what works on it, and how to mend what does not."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ringred.errors import RingredError
from ringred.runtime.config import mpirun_environment
from ringred.testing.command.parsing import add_json, say
from ringred.topology.detect import machine
from ringred.topology.gpus import gpus
from ringred.topology.torus import near_square

if TYPE_CHECKING:
    from ringred.communicator import Communicator

__all__ = ["add_doctor"]

_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_FAST = 100e6  # bytes per second that encryption should do


def add_doctor(commands: Any) -> None:
    """Adds the commands to the others."""
    topology = commands.add_parser("topology", help="what this machine is")
    add_json(topology)
    topology.set_defaults(command=_topology)

    doctor = commands.add_parser("doctor", help="check what ringred needs here, and say how to mend it")
    add_json(doctor)
    doctor.set_defaults(command=_doctor)


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
    shape = {"grid_of_one_rank_a_core": near_square(here.usable_cores)}
    say(options, asdict(here) | shape, tabulate(rows, tablefmt="plain", disable_numparse=True))
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
        *([_check_tcp] if _CONGESTION_CONTROL.exists() else []),
        *([_check_cuda] if _has_nvidia() else []),
    ]
    results = [check() for check in checks]
    table = tabulate([("ok" if good else "FAILED", what, remedy) for good, what, remedy in results], tablefmt="plain")
    failed = [what for good, what, _ in results if not good]
    keys = ("ok", "what", "remedy")
    checked = [dict(zip(keys, result, strict=True)) for result in results]
    end = "all well" if not failed else f"{len(failed)} of {len(results)} checks failed"
    say(options, checked, f"{table}\n\n{end}")
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
    remedy = "short calls take 10 µs, not 2: install ringred again, with a C compiler or after pip install ziglang"
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


def _check_tcp() -> tuple[bool, str, str]:
    control = _CONGESTION_CONTROL.read_text().strip()
    remedy = "with cubic, halving-doubling and torus are faster between hosts: docs/how-to/several-hosts.md"
    return True, f"TCP between hosts: {control}", remedy if control == "bbr" else ""
