"""`ringred bench`: how fast collectives and training steps are here, beside torch on Gloo.

Under mpirun, torchrun or `ringred run` it measures the ranks that there are; else it starts some on this host.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ringred.collectives.registry import lookup
from ringred.runtime.config import Config, detect_launch
from ringred.runtime.select import AUTOMATIC
from ringred.testing.command.parsing import Parser, add_json, count, say, size, size_of
from ringred.testing.command.run import run_here
from ringred.topology.detect import machine

if TYPE_CHECKING:
    from ringred.communicator import Communicator
    from ringred.testing.bench.measuring import Progress

__all__ = ["add_bench"]

_SIZES = [4, 1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
_GLOO = "gloo"
_TITLES = {
    "all_reduce": "All-reduce of float32: buffers written before each call and read after it; the slowest rank counts",
    "ddp": "A training step, with as large a batch on each rank",
    "scaling": "A training step on more and more ranks, with as large a batch on each (weak scaling)",
}


def add_bench(commands: Any) -> None:
    """Adds the command to the others."""
    bench = commands.add_parser("bench", help="measure collectives and training steps here, beside torch on Gloo")
    kinds = bench.add_subparsers(required=True, metavar="WHAT", parser_class=Parser)
    reduce = kinds.add_parser("all_reduce", help="time and bus bandwidth of an all-reduce")
    reduce.add_argument(
        "--bytes", type=_sizes, default=_SIZES, metavar="LIST", help="such as 4,64K,16M (4 B to 64 MiB)"
    )
    reduce.set_defaults(measure=_all_reduce)
    ddp = kinds.add_parser("ddp", help="a training step: alone, under ringred, under torch's DDP on Gloo")
    ddp.set_defaults(measure=_ddp)
    scaling = kinds.add_parser("scaling", help="efficiency of a training step on 1, 2, 4, ... ranks")
    scaling.set_defaults(measure=_scaling)
    for kind in (ddp, scaling):
        kind.add_argument("--width", type=count, default=768, metavar="W", help="of the perceptron (768: 11.5 MiB)")
        kind.add_argument("--batch", type=count, default=128, metavar="B", help="of each rank (128)")
    for name, kind in (("all_reduce", reduce), ("ddp", ddp), ("scaling", scaling)):
        kind.add_argument("--ranks", type=count, metavar="N", help="processes to start here (one for each core)")
        kind.add_argument("--algorithms", default="auto", metavar="A,B", help='such as ring,torus,tree ("auto")')
        kind.add_argument("--rounds", type=count, default=9, metavar="R", help="measurements of each, in turns (9)")
        kind.add_argument("--without-gloo", action="store_true", help="ringred alone")
        kind.add_argument("--plot", type=Path, metavar="FILE", help="a picture of it (needs matplotlib)")
        kind.add_argument("--bar", action="store_true", help=argparse.SUPPRESS)  # of ranks whose stderr is a pipe
        add_json(kind)
        kind.set_defaults(command=_bench, what=name)


def _sizes(text: str) -> list[int]:
    return [size(part) for part in text.split(",")]


def _bench(options: argparse.Namespace) -> int:
    _check(options)
    launch = detect_launch()
    ranks = options.ranks or max(2, machine().usable_cores)
    if launch.kind == "single" and ranks > 1:
        if Config.from_environment().transport == "mpi":
            raise ValueError(
                "bench: RINGRED_TRANSPORT is mpi: start the ranks by mpirun, as in `mpirun -n 2 ringred bench ...`"
            )
        more = ["--bar"] if sys.stderr.isatty() else []
        inside = Path.cwd() == Path(__file__).parents[3]
        # Modules that happen to lie in the current folder are not the command's.
        safe = ["-P"] if sys.version_info >= (3, 11) and not inside else []
        command = [sys.executable, *safe, "-m", "ringred.testing.command", *options.arguments_given, *more]
        return run_here(command, ranks)
    if options.ranks not in (None, launch.size):
        raise ValueError(f"bench: --ranks {options.ranks}, and the launcher started {launch.size}: leave it out")
    return _measured(options)


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for what would only fail once ranks are started, or all is measured."""
    for name in options.algorithms.split(","):
        if name not in AUTOMATIC:
            lookup("all_reduce", name)
    if options.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("bench: --plot needs matplotlib: pip install matplotlib")
        if options.plot.suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"bench: --plot: expected a .png, .pdf or .svg, got {options.plot}")
    if options.what == "all_reduce":
        most = machine().memory_bytes // 16 >> 20 << 20
        for nbytes in options.bytes:
            if nbytes % 4 or not 4 <= nbytes <= most:
                raise ValueError(f"bench: --bytes: expected whole float32, 4 B to {size_of(most)}, got {nbytes}")


def _measured(options: argparse.Namespace) -> int:
    import ringred

    algorithms = options.algorithms.split(",")
    with ringred.init() as comm, _gloo(comm, not options.without_gloo and comm.size > 1) as beside:
        systems = [*algorithms, *([_GLOO] if beside else [])]
        rows = options.measure(comm, systems, options)
        if comm.rank == 0:
            _show(options, comm, rows)
    return 0


@contextmanager
def _gloo(comm: Communicator, wanted: bool) -> Iterator[bool]:
    """torch's process group on Gloo among the ranks of `comm`, where it is `wanted`. Collective."""
    if not wanted:
        yield False
        return
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from ringred.runtime.seat import own_address

    place = torch.zeros(5, dtype=torch.int64)
    store = None
    if comm.rank == 0:
        own = len(set(comm.hosts)) == 1
        host = "127.0.0.1" if own else own_address(Config.from_environment().interface)
        if host is None:
            raise ValueError("bench: no address for Gloo that other hosts reach: RINGRED_INTERFACE, or --without-gloo")
        store = TCPStore(host, 0, comm.size, is_master=True, wait_for_workers=False)
        place = torch.tensor([*map(int, host.split(".")), store.port])
    comm.broadcast(place, 0)
    *address, port = place.tolist()
    if store is None:
        store = TCPStore(".".join(map(str, address)), port, comm.size, is_master=False)
    dist.init_process_group(_GLOO, store=store, rank=comm.rank, world_size=comm.size)
    try:
        yield True
    finally:
        comm.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------------- what is measured


def _all_reduce(comm: Communicator, systems: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    from ringred.testing.bench import all_reduce

    with _bar(comm, options, len(options.bytes) * options.rounds) as progress:
        return all_reduce.measure(comm, options.bytes, systems, options.rounds, progress)


def _ddp(comm: Communicator, systems: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    from ringred.testing.bench import training

    with _bar(comm, options, options.rounds) as progress:
        return training.measure(comm, systems, options.width, options.batch, options.rounds, progress)


def _scaling(comm: Communicator, systems: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    from ringred.testing.bench import training

    numbers = sorted({*(2**power for power in range(1, comm.size.bit_length()) if 2**power < comm.size), comm.size})
    own = [name for name in systems if name != _GLOO]
    rows: list[dict[str, Any]] = []
    with _bar(comm, options, len(numbers) * options.rounds) as progress:
        for number in numbers:
            part = comm.split(0 if comm.rank < number else None)
            if part is not None:
                # torch's default group is that of all ranks: on fewer, ringred is alone.
                these = systems if number == comm.size else own
                rows += training.measure(part, these, options.width, options.batch, options.rounds, progress)
                part.close()
            comm.barrier()
    return rows


@contextmanager
def _bar(comm: Communicator, options: argparse.Namespace, total: int) -> Iterator[Progress]:
    """A progress bar where somebody looks."""
    if comm.rank or not (options.bar or sys.stderr.isatty()):
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=options.what, unit="round", ncols=80, leave=False) as bar:
        yield lambda: bar.update()


# ---------------------------------------------------------------------- what is shown


def _show(options: argparse.Namespace, comm: Communicator, rows: list[dict[str, Any]]) -> None:
    import torch

    import ringred

    here = machine()
    head = {
        "what": options.what,
        "ranks": comm.size,
        "transport": comm.transport.name,
        "processor": here.processor,
        "usable_cores": here.usable_cores,
        "threads": torch.get_num_threads(),
        "ringred": ringred.__version__,
        "torch": torch.__version__,
        "rounds": options.rounds,
    }
    ranks = f"{comm.size} rank{'s' if comm.size > 1 else ''}"
    lines = [
        f"{_TITLES[options.what]}.",
        f"{ranks} over {comm.transport.name}, {here.usable_cores} cores of {here.processor}, "
        f"torch {torch.__version__}, {options.rounds} rounds in turns: medians, and quartiles.",
    ]
    if comm.size * torch.get_num_threads() > here.usable_cores:
        lines.append(f"{comm.size} ranks share {here.usable_cores} cores: this measures the cores as well.")
    table = _reduce_table(rows) if options.what == "all_reduce" else _step_table(rows)
    say(options, head | {"rows": rows}, "\n".join([*lines, "", table]))
    if options.plot is not None:
        _plot(options.plot, options.what, rows, lines[1])
        print(f"plot: {options.plot}", file=sys.stderr if options.json else sys.stdout)


def _reduce_table(rows: Sequence[dict[str, Any]]) -> str:
    systems = list(dict.fromkeys(row["system"] for row in rows))
    found = {(row["bytes"], row["system"]): row for row in rows}
    table: list[list[str]] = []
    for nbytes in dict.fromkeys(row["bytes"] for row in rows):
        line = [size_of(nbytes)]
        for name in systems:
            row = found[nbytes, name]
            line += [f"{row['seconds'] * 1e6:.1f}", f"{row['low'] * 1e6:.1f}–{row['high'] * 1e6:.1f}"]
            line += [f"{row['bus_bandwidth'] / 1e9:.2f}"]
        if _GLOO in systems and len(systems) > 1:
            line.append(f"{found[nbytes, _GLOO]['seconds'] / found[nbytes, systems[0]]['seconds']:.1f}×")
        table.append(line)
    heads = ["size", *(text for name in systems for text in (f"{name} µs", "quartiles", "GB/s"))]
    if _GLOO in systems and len(systems) > 1:
        heads.append(f"gloo / {systems[0]}")
    return str(tabulate(table, headers=heads, disable_numparse=True, colalign=["right"] * len(heads)))


def _step_table(rows: Sequence[dict[str, Any]]) -> str:
    table = [
        (
            row["ranks"],
            "torch's DDP on Gloo" if row["system"] == _GLOO else row["system"],
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['low'] * 1e3:.2f}–{row['high'] * 1e3:.2f}",
            f"{row['efficiency']:.1%}",
            "" if row["hidden"] is None else f"{row['hidden']:.0%}",
        )
        for row in rows
    ]
    heads = ["ranks", "", "step ms", "quartiles", "efficiency", "reduction hidden"]
    align = ("right", "left", *["right"] * 4)
    return str(tabulate(table, headers=heads, disable_numparse=True, colalign=align))


def _plot(path: Path, what: str, rows: Sequence[dict[str, Any]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y = ("bytes", "bus_bandwidth") if what == "all_reduce" else ("ranks", "efficiency")
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    scale: Callable[[float], float] = (lambda value: value / 1e9) if what == "all_reduce" else (lambda value: value)
    for name in dict.fromkeys(row["system"] for row in rows):
        points = [row for row in rows if row["system"] == name]
        axes.plot([row[x] for row in points], [scale(row[y]) for row in points], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes" if what == "all_reduce" else "ranks")
    axes.set_ylabel("bus bandwidth, GB/s" if what == "all_reduce" else "efficiency (one rank alone = 1)")
    axes.set_title(title, fontsize=8)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
