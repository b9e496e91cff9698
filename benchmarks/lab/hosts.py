"""Hosts on one machine: network namespaces with names of their own, on switches whose ports have a rate.

Needs root, iproute2 and `tc`. Nothing leaves the machine, and nothing is seen in its own network: switches are bridges
in a namespace of their own. Each port is limited in both directions, as a cable is. With racks, the hosts of a rack
share an uplink to the others. Between hosts TCP's congestion control is CUBIC, Linux's own choice, whatever the machine
has set. What a killed run leaves is found by its name: `clean`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from ipaddress import ip_network
from pathlib import Path
from typing import IO, Any

from lab.network import Network

__all__ = [
    "BURST_BYTES",
    "Hosts",
    "RanksFailed",
    "clean",
    "left_behind",
    "mine",
    "mpi_version",
    "unavailable",
]

_PREFIX = "ringred-lab-"
BURST_BYTES = 32 << 10
"""A queue's tokens: two packets as large as the kernel may hand them down."""
_SUBNET = ip_network("10.78.0.0/24")
_QUEUE = "2mb"  # what a switch with shared memory gives to a port
_GSO_BYTES = "16384"
_LOOK_SECONDS = 0.1
_LAST_WORDS_SECONDS = 20.0  # for the others, once a rank has failed
# What is started on a host has its name, and a /dev/shm of its own, which goes with the last process that sees it.
_NAMED = """
import os, socket, subprocess, sys
socket.sethostname(os.environ["HOST_NAME"])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
os.execv(sys.argv[1], sys.argv[1:])
"""
# What mpirun starts its daemons with, in the place of ssh: AGENT address command...
_AGENT = """#!/bin/sh
address=$1; shift
host=$((${address##*.} - 1))
export HOST_NAME=host$host RINGRED_INTERFACE=$address
exec ip netns exec PREFIX-$host unshare --uts PYTHON -c 'NAMED' /bin/sh -c "$*"
"""


def unavailable() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "the laboratory makes network namespaces, which needs root (sudo, or a container with --privileged)"
    missing = [tool for tool in ("ip", "tc", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"the laboratory needs {', '.join(missing)}: install iproute2 and util-linux"
    trial = f"{mine()}-trial"
    try:
        _run("ip", "netns", "add", trial)
        _run("ip", "-n", trial, "link", "add", "eth0", "type", "veth", "peer", "name", "port0")
        _limit(trial, "eth0", 100)
        named = [sys.executable, "-c", _NAMED, shutil.which("true") or "true"]
        _run("env", "HOST_NAME=trial", "ip", "netns", "exec", trial, "unshare", "--uts", *named)
    except RuntimeError as failure:
        return f"the laboratory cannot make its networks here: {failure}"
    finally:
        subprocess.run(["ip", "netns", "delete", trial], capture_output=True, check=False)
    return None


class RanksFailed(RuntimeError):
    """Some ranks ended with an error, or waited for those that did. `texts` is what each of them (or mpirun, for all)
    had printed; why they failed they have said on stderr."""

    def __init__(self, statuses: Sequence[int | None], texts: list[str]) -> None:
        super().__init__(f"exit statuses {statuses}")
        self.texts = texts


class Hosts:
    """A network of hosts, as a context: at its end, processes on them are killed and everything is removed. While ranks
    run, `watch` gets what the first one has printed so far."""

    def __init__(self, network: Network, watch: Callable[[str], None] | None = None) -> None:
        self.network = network
        self.name = mine()
        self._watch = watch
        self._running: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix=f"{self.name}-")  # temporary files of the ranks as well

    def address(self, host: int) -> str:
        """The address of a host."""
        return str(_SUBNET[host + 1])

    def __enter__(self) -> Hosts:
        network = self.network
        try:
            switch = f"{self.name}-switch"
            _run("ip", "netns", "add", switch)
            for rack in range(network.racks):
                _run("ip", "-n", switch, "link", "add", f"rack{rack}", "type", "bridge")
                _run("ip", "-n", switch, "link", "set", f"rack{rack}", "up")
            for host in range(network.hosts):
                space = f"{self.name}-{host}"
                _run("ip", "netns", "add", space)
                ends = ["link", "add", "eth0", "type", "veth", "peer", "name", f"port{host}", "netns", switch]
                _run("ip", "-n", space, *ends)
                _run("ip", "-n", space, "address", "add", f"{self.address(host)}/{_SUBNET.prefixlen}", "dev", "eth0")
                self._plug(switch, f"port{host}", network.rack_of(host))
                for where, device in ((space, "eth0"), (switch, f"port{host}")):
                    _run("ip", "-n", where, "link", "set", device, "up")
                    _limit(where, device, network.mbit_of(host))
                route = ["route", "replace", str(_SUBNET), "dev", "eth0", "congctl", network.control]
                _run("ip", "-n", space, *route)
                _run("ip", "-n", space, "link", "set", "lo", "up")
            if network.racks > 1:
                self._core(switch)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _plug(self, switch: str, device: str, rack: int | str) -> None:
        bridge = f"rack{rack}" if isinstance(rack, int) else rack
        _run("ip", "-n", switch, "link", "set", device, "master", bridge)

    def _core(self, switch: str) -> None:
        """The switch between the racks."""
        _run("ip", "-n", switch, "link", "add", "core", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "core", "up")
        for rack in range(self.network.racks):
            up, down = f"up{rack}", f"down{rack}"
            _run("ip", "-n", switch, "link", "add", up, "type", "veth", "peer", "name", down)
            self._plug(switch, up, rack)
            self._plug(switch, down, "core")
            for device in (up, down):
                _run("ip", "-n", switch, "link", "set", device, "up")
                _limit(switch, device, self.network.uplink_mbit)

    # ------------------------------------------------------------------ processes

    def start(
        self, host: int, command: Sequence[str], variables: Mapping[str, object], stdout: int | IO[str]
    ) -> subprocess.Popen[str]:
        """Starts a command on a host."""
        inner = ["ip", "netns", "exec", f"{self.name}-{host}", "unshare", "--uts", sys.executable, "-c", _NAMED]
        environment = {**os.environ, "HOST_NAME": f"host{host}", "TMPDIR": self._folder.name}
        environment |= {name: str(value) for name, value in variables.items()}
        started = subprocess.Popen(
            [*inner, shutil.which(command[0]) or command[0], *command[1:]],
            env=environment,
            stdout=stdout,
            text=True,
            start_new_session=True,
        )
        self._running.append(started)
        return started

    @property
    def _gloo(self) -> dict[str, object]:
        """Where the ranks of torch.distributed meet, and on which of a host's networks."""
        return {"MASTER_ADDR": self.address(0), "MASTER_PORT": 29503, "GLOO_SOCKET_IFNAME": "eth0"}

    def torch_ranks(self, program: Path, *arguments: str, **variables: object) -> list[str]:
        """Runs a program on all ranks, as torchrun would; what each rank printed. Raises `RanksFailed`."""
        ranks, each = self.network.ranks, self.network.each
        shared = {"WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1, **self._gloo}
        with ExitStack() as opened:
            files = [opened.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
            began = [
                self.start(
                    rank // each,
                    [sys.executable, str(program), *arguments],
                    shared
                    | {"RANK": rank, "LOCAL_RANK": rank % each, "RINGRED_INTERFACE": self.address(rank // each)}
                    | variables,
                    files[rank],
                )
                for rank in range(ranks)
            ]
            return self._outputs(began, files)

    def mpi_ranks(self, program: Path, *arguments: str, **variables: object) -> list[str]:
        """Runs a program on all ranks by Open MPI, whose TCP connects the hosts; what the job printed.
        Raises `RanksFailed`."""
        places = ",".join(f"{self.address(host)}:{self.network.each}" for host in range(self.network.hosts))
        command = [
            *[_mpirun(), "--host", places, "-n", str(self.network.ranks), "--map-by", "slot", "--bind-to", "none"],
            *["--prtemca", "plm_ssh_agent", str(self._agent()), "--prtemca", "plm_ssh_no_tree_spawn", "1"],
            *["--prtemca", "prte_if_include", "eth0", "--mca", "btl_tcp_if_include", "eth0"],
            *["--mca", "pml", "ob1", "--mca", "btl", "tcp,self,sm", "--mca", "mpi_yield_when_idle", "1"],
        ]
        root = {"OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1}
        settings = {"OMP_NUM_THREADS": 1, **root, **self._gloo, **variables}
        for name in (*settings, "PYTHONPATH"):
            command += ["-x", name]
        with tempfile.TemporaryFile("w+") as output:
            first = settings | {"RINGRED_INTERFACE": self.address(0)}  # the agent sets it on the other hosts
            began = self.start(0, [*command, sys.executable, str(program), *arguments], first, output)
            return self._outputs([began], [output])

    def _agent(self) -> Path:
        """A file that starts commands on hosts, as ssh would."""
        path = Path(self._folder.name) / "agent"
        text = _AGENT.replace("PREFIX", self.name).replace("PYTHON", sys.executable).replace("NAMED", _NAMED.strip())
        path.write_text(text)
        path.chmod(0o755)
        return path

    def _outputs(self, began: Sequence[subprocess.Popen[str]], files: Sequence[IO[str]]) -> list[str]:
        deadline = float("inf")
        while time.monotonic() < deadline and any(process.poll() is None for process in began):
            if deadline == float("inf") and any(process.returncode for process in began):
                deadline = time.monotonic() + _LAST_WORDS_SECONDS
            if self._watch is not None:
                self._watch(_text(files[0]))
            time.sleep(_LOOK_SECONDS)  # whichever ends first counts, and `watch` is told meanwhile
        statuses = [process.poll() for process in began]  # None: it waits for one that has failed
        texts = [_text(file) for file in files]
        if any(statuses):
            raise RanksFailed(statuses, texts)
        return texts

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _remove([name for name in _namespaces() if name.startswith(f"{self.name}-")])
        self._folder.cleanup()


def mpi_version() -> str:
    """Which MPI `mpirun` is of."""
    told = subprocess.run([_mpirun(), "--version"], capture_output=True, text=True, check=True).stdout
    return told.splitlines()[0].removeprefix("mpirun").strip(" ()").replace(") ", " ")


def _mpirun() -> str:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside if beside.exists() else shutil.which("mpirun") or "mpirun")


def left_behind() -> list[str]:
    """The namespaces of runs that have ended."""
    return [name for name in _namespaces() if name.startswith(_PREFIX) and not _lives(name)]


def clean(out: Path) -> tuple[list[str], list[str]]:
    """Removes what runs that were killed have left: namespaces, the processes in them, files, also unfinished ones in
    `out`. Returns the names of what is gone, and of what could not be removed."""
    names = left_behind()
    _remove(names)
    folders = [path for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if not _lives(path.name)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    files = [path for path in out.glob(f".{_PREFIX}*") if not _lives(path.name[1:])]
    for path in files:
        path.unlink(missing_ok=True)
    left = [*folders, *files]
    still = set(left_behind()) | {str(path) for path in left if path.exists()}
    return [name for name in (*names, *map(str, left)) if name not in still], sorted(still)


def mine() -> str:
    """What everything of this process is called by: its number, and when it was started, for numbers come again."""
    return f"{_PREFIX}{os.getpid()}.{_started(os.getpid())}"


def _lives(name: str) -> bool:
    """Whether the process still runs that gave this name."""
    number, _, started = name.removeprefix(_PREFIX).partition("-")[0].partition(".")
    return bool(started) and _started(number) == started


def _started(process: int | str) -> str:
    """When a process was started, in ticks of the kernel; nothing if it has ended, though nobody has waited for it."""
    try:
        fields = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _text(file: IO[str]) -> str:
    """What is in a file that others write to: they share its position, which stays."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.strip()]


def _remove(names: Sequence[str]) -> None:
    """A namespace whose processes cannot be killed keeps its name, by which they are found."""
    for name in names:
        for number in _inside(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    for name in names:
        deadline = time.monotonic() + 2
        while _inside(name) and time.monotonic() < deadline:
            time.sleep(0.02)  # a killed process is gone when its kernel is done with it
        if not _inside(name):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _inside(name: str) -> list[int]:
    """The processes in a namespace."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    return list(map(int, listed.split()))


def _limit(space: str, device: str, mbit: float) -> None:
    limits = f"rate {mbit:g}mbit burst {BURST_BYTES} limit {_QUEUE}".split()
    _run("ip", "-n", space, "link", "set", device, "gso_max_size", _GSO_BYTES)
    _run("tc", "-n", space, "qdisc", "add", "dev", device, "root", "tbf", *limits)


def _run(*words: Any) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
