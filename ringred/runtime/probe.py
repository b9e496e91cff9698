"""Measures a communicator's costs for `select`: a few all-reduces in each kind of memory, in well under a second.

The measurement does what training does: every rank writes its buffer, then all ranks reduce it. The costs are kept for
the next start.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ringred import native
from ringred.collectives.registry import lookup
from ringred.runtime.config import Config
from ringred.runtime.select import CROWDED, share_bounds
from ringred.schedule.cost import Link, simulate
from ringred.topology import calibrate
from ringred.topology.calibrate import KINDS, SHORT_BYTES, Costs, Sample, Tuning, fit, rounded
from ringred.topology.detect import machine
from ringred.transports.base import Gather, Transport

__all__ = ["Measured", "measure", "probe", "seconds_of", "tune"]

_ALGORITHMS = ("one_shot", "direct")
_IN_TURN = "halving_doubling"  # for more than two ranks: sends to one peer after another, the others to all at once
_BYTES = (64, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 1 << 20, 4 << 20)
_SHORT, _LONG = 15, 5  # number of calls for sizes up to 64 KiB, and above
_COMPILED = 60  # those up to `SHORT_BYTES` where the compiled player takes microseconds for each
_WARMING = 40  # calls before them, after which each of the slots was used
_MANY_RANKS = 16  # with more ranks, one call each, because every rank sends to all


class Measured(Protocol):
    """A communicator, as far as it is needed to measure it."""

    rank: int
    size: int
    hosts: tuple[int, ...]
    config: Config
    transport: Transport
    tuning: Tuning

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this rank's host."""

    def tune(self, tuning: Tuning) -> None:
        """From here on "auto" decides by `tuning`."""

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory that ranks of a host share."""

    def all_reduce(self, tensor: torch.Tensor, *, algorithm: str = "auto") -> object:
        """The sum over the ranks, in place."""

    def barrier(self) -> object:
        """Returns once every rank has called it."""

    def synchronize(self) -> None:
        """Returns once its device is done."""

    def split(self, color: int | None) -> Measured | None:
        """The ranks of one color."""

    def close(self) -> None:
        """Gives everything back."""


def tune(comm: Measured, gather: Gather, on: str = "") -> None:
    """Sets the costs of `comm`: those that rank 0 has in its file, or newly measured ones, which rank 0 then stores.
    `on` names the device."""
    path = comm.config.tuning
    here = machine()
    played = "" if comm.transport.player is None else f", compiled {native.VERSION}"
    key = (
        f"{here.processor}, {here.usable_cores} cores; {comm.transport.name}{played}{on}, {comm.size} ranks on "
        f"{len(set(comm.hosts))} hosts; torch {torch.__version__}; {len(KINDS)} kinds"
    )
    known = None if path is None or comm.size == 1 else calibrate.load(path, key)
    # Ranks may have different files and settings; all ranks use those of rank 0.
    said = gather("off" if path is None or comm.size == 1 else json.dumps(known))[0]
    if said == "off":
        return
    if said != "null":
        comm.tune({name: tuple(costs) for name, costs in json.loads(said).items()})
        return
    comm.tune(probe(comm))
    if comm.rank == 0 and path is not None:
        trouble = calibrate.store(path, key, comm.tuning)
        if trouble is not None:
            warnings.warn(f"ringred: measured costs are not kept for the next start: {trouble}", stacklevel=2)


def probe(comm: Measured) -> Tuning:
    """The costs of `comm`'s links, the same on every rank. Collective."""
    found: dict[str, Costs] = {}
    hosts = len(set(comm.hosts))
    if hosts == 1:
        _inside(comm, found)
    else:
        inside = comm.split(comm.hosts[comm.rank])
        between = comm.split(comm.local_ranks.index(comm.rank))
        assert inside is not None, "every rank has a host"
        assert between is not None, "every rank has a place on its host"
        if inside.size > 1:
            _inside(inside, found)
        if between.size > 1:
            found["between"] = fit([sample for _, sample in _samples(between, "tensor")])
        inside.close()
        between.close()
    return _agreed(comm, found)


def _inside(comm: Measured, found: dict[str, Costs]) -> None:
    for memory in ("tensor", "window") if comm.transport.windows else ("tensor",):
        samples = _samples(comm, memory)
        short = [sample for nbytes, sample in samples if nbytes <= SHORT_BYTES]
        long = [sample for nbytes, sample in samples if nbytes >= SHORT_BYTES // 2]
        found[f"short {memory}"] = fit(short, within_host=True)
        found[memory] = fit(long, within_host=True)
    if hasattr(comm.transport, "can_all_reduce"):
        times = [seconds_of(comm, _tensor(comm, nbytes, "tensor"), "native", _calls(comm, nbytes)) for nbytes in _BYTES]
        found["native"] = fit([Sample(1, nbytes, 0, 0, 0, took) for nbytes, took in zip(_BYTES, times, strict=True)])


def _samples(comm: Measured, memory: str) -> list[tuple[int, Sample]]:
    """Measured all-reduces of tensors in `memory`, with their bytes."""
    if comm.transport.windows and comm.size <= _MANY_RANKS:  # shared memory is slow until it was used once
        seconds_of(comm, _tensor(comm, SHORT_BYTES, memory), "one_shot", _WARMING)
    names = (*_ALGORITHMS, _IN_TURN) if comm.size > 2 else _ALGORITHMS
    samples = []
    for nbytes, name in itertools.product(_BYTES, names):
        entry = lookup("all_reduce", name)
        group = entry.group(comm.size)
        steps, bounds = entry.steps(group), share_bounds(nbytes, entry.units(group))
        took = seconds_of(comm, _tensor(comm, nbytes, memory), name, _calls(comm, nbytes))

        def priced(alpha: float, beta: float, gamma: float, latency: float) -> float:
            between = len(set(comm.hosts)) > 1
            link: Link = (alpha, beta, latency, CROWDED * beta) if between else (alpha, beta, latency)
            return simulate(comm.size, steps, bounds, lambda sender, receiver: link, gamma).seconds  # noqa: B023

        parts = priced(1, 0, 0, 0), priced(0, 1, 0, 0), priced(0, 0, 1, 0), priced(0, 0, 0, 1)
        samples.append((nbytes, Sample(*parts, 1, took)))
    return samples


def _calls(comm: Measured, nbytes: int) -> int:
    if comm.size > _MANY_RANKS:
        return 1
    if comm.transport.player is not None and nbytes <= SHORT_BYTES:
        return _COMPILED
    return _SHORT if nbytes <= 64 << 10 else _LONG


def _tensor(comm: Measured, nbytes: int, memory: str) -> torch.Tensor:
    elements = nbytes // 4
    return comm.empty(elements, torch.float32) if memory == "window" else torch.empty(elements, device=comm.device)


def seconds_of(comm: Measured, tensor: torch.Tensor, algorithm: str, calls: int) -> float:
    """The median time of an all-reduce of `tensor`, which is written before each call. Collective."""
    return measure(comm, lambda: tensor.fill_(1.0), lambda: comm.all_reduce(tensor, algorithm=algorithm), calls)


def measure(comm: Measured, before: Callable[[], object], call: Callable[[], object], calls: int) -> float:
    """The median time of `call`, after one warm-up call. Collective.

    Before each call, this rank runs `before` and all ranks meet in a barrier.
    """
    times = []
    for _ in range(calls + 1):
        before()
        comm.barrier()
        comm.synchronize()
        began = time.perf_counter()
        call()
        comm.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _agreed(comm: Measured, found: dict[str, Costs]) -> Tuning:
    """The mean of each kind over the ranks that measured it: every rank must decide with the same numbers."""
    values = [(*found[kind], 1.0) if kind in found else (0.0,) * 6 for kind in KINDS]
    table = torch.tensor(values, dtype=torch.float64, device=comm.device)
    comm.all_reduce(table, algorithm="one_shot")
    rows = zip(KINDS, table.tolist(), strict=True)
    return {kind: rounded([total / count for total in totals]) for kind, (*totals, count) in rows if count}
