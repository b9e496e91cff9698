"""Scaling efficiency in print, and what the simulator makes of it when it is calibrated on the smallest counts only.

The model: a step computes 1 + o times as long as on one processor alone (input, stragglers), every bucket is
all-reduced when backward has filled it (or all of them after it, where print says so), and of a link between hosts a
part f is used. Both are fitted to Horovod's
smallest count, o to Inception V3 and f to VGG-16 on 128 processors; everything else is predicted with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from lab.network import Network
from lab.predict import Costs, linear, step_of
from lab.profiles import Processor, Profile, profile
from ringred.buckets import MIB
from ringred.collectives.registry import lookup
from ringred.topology.model import grid_links

__all__ = ["CALIBRATION", "LARGEST", "PUBLISHED", "Fit", "Published", "fitted", "simulated"]

ALPHA = 10e-6  # seconds a message between hosts, stated
_COUNTED = (1 << 20, 32 << 20)  # bytes of the two all-reduces that are simulated


@dataclass(frozen=True)
class Published:
    """A row of print: `efficiency` on a grid of processors (hosts outermost), in percent, against `seconds` that a step
    of `batch` samples takes alone; links in bytes a second."""

    work: str
    model: str
    efficiency: float
    grid: tuple[int, ...]
    batch: int
    seconds: float
    inside: float
    between: float
    left_out: str
    bytes_an_element: int = 4
    cap: int = 25 * MIB
    algorithm: str = "torus"
    overlap: bool = True

    @property
    def processors(self) -> int:
        """How many."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Fit:
    """What a step computes longer than alone, as a part of that, and the part of a link between hosts that is used."""

    overhead: float
    link: float


def _horovod(model: str, efficiency: float, hosts: int, seconds: float) -> Published:
    # 4 Pascal GPUs a server, 25 Gbit/s RoCE; batches of 64 at the rates of one GPU in Horovod's README of 2017; a flat
    # NCCL ring, tensors fused to 64 MiB. Efficiencies: Horovod's benchmark page (128 and 512 GPUs).
    left = "cycles of fusion, host staging, input"
    grid, ring = (4, hosts), {"cap": 64 * MIB, "algorithm": "ring"}
    return Published("Horovod 2018", model, efficiency, grid, 64, seconds, 10e9, 3.1e9, left, 4, **ring)


CALIBRATION = (_horovod("inception", 90.0, 32, 64 / 134.4), _horovod("vgg16", 79.0, 32, 64 / 130.9))
"""Overhead and part of a link follow from these."""

# Goyal et al.: Caffe2, 8 P100 a server, NVLink, 50 Gbit/s; batches of 32 take 0.155 s. Cho et al.: 4 P100 a server, two
# InfiniBand links. Akiba et al.: 8 P100, two FDR; gradients are sent after
# backward, in 16 bits. Jia et al.: 8 P40, 100 Gbit/s, 16 bits. Mikami et al.: 4 V100, two
# EDR, 16 bits. Where the time of a step is not in print it is assumed, from 220 (P100), 150 (P40) and 640 (V100 in 16
# bits) images a second.
PUBLISHED = (
    _horovod("resnet101", 90.0, 32, 64 / 119.4),
    _horovod("inception", 90.0, 128, 64 / 134.4),
    _horovod("resnet101", 90.0, 128, 64 / 119.4),
    _horovod("vgg16", 68.0, 128, 64 / 130.9),
    Published("Goyal et al. 2017", "resnet50", 90.0, (8, 32), 32, 0.155, 20e9, 6.25e9, "baseline is 8 GPUs"),
    Published("Cho et al. 2017", "resnet50", 95.0, (4, 64), 32, 0.145, 20e9, 25e9, "baseline is a node"),
    Published("Akiba et al. 2017", "resnet50", 80.0, (8, 128), 32, 0.145, 10e9, 13.6e9, "input", 2, overlap=False),
    Published("Jia et al. 2018", "resnet50", 87.9, (8, 256), 32, 0.213, 10e9, 12.5e9, "large-batch input", 2),
    Published("Mikami et al. 2018 v1", "resnet50", 91.6, (32, 34), 32, 0.05, 25e9, 25e9, "batch control", 2),
    Published("Mikami et al. 2018 v2", "resnet50", 84.75, (32, 32), 32, 0.05, 25e9, 25e9, "batch control", 2),
)

LARGEST = replace(PUBLISHED[-1], efficiency=math.nan, grid=(54, 64))
"""As many as any row's work had; how it laid 3,456 out is not known here."""


def simulated(row: Published, fit: Fit, seconds_of: Callable[[int], float] | None = None) -> float:
    """The efficiency that the simulator gives, in percent."""
    model = _model(row, fit)
    costs, network = Costs(ALPHA, 1 / row.between, 0.0, 0.0, 0.0, 1 << 20), Network(row.processors, 1.0)
    reduced = seconds_of or reduces(row, fit)
    if not row.overlap:
        return 100 * row.seconds / (model.seconds + reduced(model.nbytes))
    step = step_of(model, 1.0, row.algorithm, costs, network, caps=(row.cap,), seconds_of=reduced)
    return 100 * row.seconds / step.seconds


def _model(row: Published, fit: Fit) -> Profile:
    stated = profile(row.model, row.batch, Processor(row.work, 1e12))
    return profile(row.model, row.batch, Processor(row.work, 1e12 * stated.seconds / row.seconds / (1 + fit.overhead)))


def reduces(row: Published, fit: Fit) -> Callable[[int], float]:
    """The seconds of an all-reduce of so many gradients' bytes in 32 bits."""
    x = row.grid[0]
    between = fit.link * row.between
    # A flat ring leaves each host once. On a grid all processors of a host cross its links at once.
    shared = 1 if row.algorithm == "ring" else x if x <= 8 else 4
    inside = (ALPHA, 1 / row.inside) if x <= 8 else (ALPHA, shared / between)
    time = _line(row.algorithm, row.grid, inside, (ALPHA, shared / between))
    return lambda nbytes: time(int(nbytes * row.bytes_an_element / 4))


@cache
def _line(
    algorithm: str, grid: tuple[int, ...], inside: tuple[float, float], between: tuple[float, float]
) -> Callable[[int], float]:
    """The same of bytes as they are; of a ring, which is flat, for all that have it."""
    topology = grid_links(grid, [inside, between], 0.0)
    group = lookup("all_reduce", algorithm).group(math.prod(grid), grid=None if algorithm == "ring" else grid)
    return linear(algorithm, group, topology, *_COUNTED, alike=algorithm == "torus")


def fitted() -> Fit:
    """By bisection: the overhead that gives Inception's efficiency, the part of a link that gives VGG-16's, in turn
    until both hold."""
    compute, communicate = CALIBRATION
    fit = Fit(0.05, 0.5)
    times = reduces(communicate, Fit(0.0, 1.0))
    empty = times(0)

    def reduced(link: float) -> Callable[[int], float]:
        return lambda nbytes: empty + (times(nbytes) - empty) / link  # both rows have the same ring

    def too_slow(overhead: float) -> float:
        return compute.efficiency - simulated(compute, Fit(overhead, fit.link), reduced(fit.link))

    def too_fast(link: float) -> float:
        return simulated(communicate, Fit(fit.overhead, link), reduced(link)) - communicate.efficiency

    for _ in range(4):
        fit = Fit(_bisect(too_slow, 0.0, 0.5), fit.link)
        fit = Fit(fit.overhead, _bisect(too_fast, 0.02, 1.0))
    return fit


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function is zero."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return low
