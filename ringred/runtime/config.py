"""The only module that reads environment variables: every RINGRED_* variable, and those that launchers set.

| variable | meaning | default |
| --- | --- | --- |
| RINGRED_TIMEOUT | seconds after which a collective fails if its peers do not take part | 300 |
| RINGRED_SEGMENT_BYTES | greatest message in bytes; larger chunks are pipelined | the transport's |
| RINGRED_TRANSPORT | the one transport to use: shm, mpi or torch_p2p | shm within a host, else by the launcher |
| RINGRED_INTERFACE | address by which other hosts reach this one, where it has several | the host's own |
| RINGRED_TUNING | file of measured costs that "auto" uses; off: built-in costs | ~/.cache/ringred/tuning.json |
| RINGRED_COMPILED | off: plans on shared memory are run by Python, not by the compiled player | on |
| RINGRED_CHECK | sites: ranks must also call at the same file and line, or get a CollectiveMismatch | arguments |
| RINGRED_STALL_SECONDS | a rank that waits longer says once who is missing; 0: it does not | 10 |
| RINGRED_MIN_RANKS | a training that goes on after failures waits for others where fewer are left | 1 |
| RINGRED_BLOCKING | on: the host waits for the device in every call, which so raises its own failure | off |
| RINGRED_TRACE | file of the Chrome trace; the rank is put before the suffix | none is written |
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Config",
    "Launch",
    "cache_folder",
    "detect_launch",
    "mpi_environment",
    "mpirun_environment",
    "restart_count",
    "run_environment",
    "store_outlives_ranks",
    "take_variables",
]


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of a communicator; times are in seconds. `tuning` is None for built-in costs."""

    timeout: float = 300.0
    segment_bytes: int | None = None
    transport: str | None = None
    interface: str | None = None
    trace: str | None = None
    tuning: Path | None = None
    compiled: bool = True
    blocking: bool = False
    sites: bool = False
    stall_seconds: float = 10.0
    least_ranks: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Config:
        """Reads the RINGRED_* variables. Raises a `ValueError` that names an invalid variable."""
        env = os.environ if environment is None else environment
        segment = env.get("RINGRED_SEGMENT_BYTES")
        return cls(
            timeout=_positive("RINGRED_TIMEOUT", env.get("RINGRED_TIMEOUT", "300")),
            segment_bytes=None if segment is None else math.ceil(_positive("RINGRED_SEGMENT_BYTES", segment)),
            transport=_choice("RINGRED_TRANSPORT", env.get("RINGRED_TRANSPORT"), ("shm", "mpi", "torch_p2p")),
            interface=env.get("RINGRED_INTERFACE"),
            trace=env.get("RINGRED_TRACE"),
            tuning=_tuning_file(env),
            compiled=_choice("RINGRED_COMPILED", env.get("RINGRED_COMPILED"), ("on", "off")) != "off",
            blocking=_choice("RINGRED_BLOCKING", env.get("RINGRED_BLOCKING"), ("on", "off")) == "on",
            sites=_choice("RINGRED_CHECK", env.get("RINGRED_CHECK"), ("sites", "arguments")) == "sites",
            stall_seconds=_seconds("RINGRED_STALL_SECONDS", env.get("RINGRED_STALL_SECONDS", "10")),
            least_ranks=int(_positive("RINGRED_MIN_RANKS", env.get("RINGRED_MIN_RANKS", "1"))),
        )


def _seconds(name: str, text: str) -> float:
    return 0.0 if text == "0" else _positive(name, text)


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {text!r}")
    return value


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where ringred keeps what it would have to make again: measured costs, compiled kernels."""
    env = os.environ if environment is None else environment
    return Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ringred"


def _tuning_file(env: Mapping[str, str]) -> Path | None:
    chosen = env.get("RINGRED_TUNING")
    if chosen is None:
        return cache_folder(env) / "tuning.json"
    return None if chosen == "off" else Path(chosen)


def _choice(name: str, text: str | None, choices: tuple[str, ...]) -> str | None:
    if text is not None and text not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {text!r}")
    return text


@dataclass(frozen=True, slots=True)
class Launch:
    """What started this process: "mpi", "store" (RANK, WORLD_SIZE, MASTER_ADDR), "run" (`ringred run`) or "single".

    For "run", `rendezvous` is the card of who keeps it and `secret` the job's; a process that `joins` takes the place
    of one that failed."""

    kind: str
    rank: int
    size: int
    restart: str = "0"
    rendezvous: str = ""
    secret: str = ""
    joins: bool = False


# The variables in which Open MPI, MPICH and Intel MPI (PMI, PMIx) and MVAPICH pass the rank and the number of ranks.
_MPI_RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_MPI_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def restart_count(environment: Mapping[str, str] | None = None) -> str:
    """How many times torchrun has restarted the ranks."""
    env = os.environ if environment is None else environment
    return env.get("TORCHELASTIC_RESTART_COUNT", "0")


def store_outlives_ranks(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun's agent serves the store by which its ranks meet, so that the death of none ends it."""
    env = os.environ if environment is None else environment
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def detect_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Detects from the environment which launcher started this process. Raises `ValueError` if the environment
    describes several ranks but no way to connect them."""
    env = os.environ if environment is None else environment
    if "RINGRED_RENDEZVOUS" in env:
        joins = env.get("RINGRED_JOINS") == "1"
        place, secret = env["RINGRED_RENDEZVOUS"], env["RINGRED_SECRET"]
        return Launch("run", int(env["RANK"]), int(env["WORLD_SIZE"]), "0", place, secret, joins)
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return Launch("store", int(env["RANK"]), int(env["WORLD_SIZE"]), restart_count(env))
    rank = next((env[name] for name in _MPI_RANK if name in env), None)
    size = next((env[name] for name in _MPI_SIZE if name in env), None)
    if rank is not None:
        return Launch("mpi", int(rank), int(size or 1))
    # Ranks that cannot find each other must not continue as separate groups of one rank.
    size = next((env[name] for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") if name in env), "1")
    if int(size) > 1:
        raise ValueError(
            f"{size} ranks were started, and nothing says how they find each other: torchrun sets RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT; srun needs --mpi=pmix (or pmi2) for MPI"
        )
    return Launch("single", 0, 1)


def mpi_environment(environment: MutableMapping[str, str] | None = None) -> None:
    """Settings of MPI libraries; call it before they start. Set variables are kept.

    They yield the core while they wait: a rank that polls slows a backward pass on the same core by more than the time
    it uses itself. And Open MPI's TCP sends our segments without asking the receiver first, which has posted its
    receives by then: the answer would wait behind the data that goes the other way (benchmarks/results/lab.md).
    """
    env = os.environ if environment is None else environment
    for name in ("OMPI_MCA_mpi_yield_when_idle", "I_MPI_THREAD_YIELD"):
        env.setdefault(name, "1")
    for limit in ("eager_limit", "rndv_eager_limit", "max_send_size"):
        env.setdefault(f"OMPI_MCA_btl_tcp_{limit}", str(1 << 20))


def run_environment(
    ranks: int, least: int, rendezvous: str, secret: str, port: int, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What `ringred run` gives to each of `ranks` processes of a host (`Launch`); `port` is for torch's own store, in
    programs that use it. Of the rest, set variables are kept."""
    env = os.environ if environment is None else environment
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        **env,
        "RINGRED_RENDEZVOUS": rendezvous,
        "RINGRED_SECRET": secret,
        "RINGRED_MIN_RANKS": str(least),
    }


def take_variables(variables: Mapping[str, str]) -> None:
    """From here on this process has these variables: it is started before it is known which rank it will be."""
    os.environ.update(variables)


def mpirun_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment in which any mpirun can start more ranks than cores, also as root; set variables are kept.

    The same settings as in launch/mpirun.sh: without them Open MPI refuses both.
    """
    defaults = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_btl": "^ofi"}
    if os.geteuid() == 0:
        defaults |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**defaults, **(os.environ if environment is None else environment)}
