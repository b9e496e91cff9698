"""What many ranks would do: steps of the models on hosts of one rank each, by the simulator alone.

The links are stated, not calibrated: 10 Gbit/s, 10 µs a message, and nobody is in another's way. Of a bucket's
all-reduce some sizes are simulated, and others are on the lines between them. Trees and one server are cut into
messages, for they send while they receive. A shard of a server on each rank (`direct`) takes as long as a ring here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy

from lab.network import Network
from lab.predict import Costs, linear, step_of
from lab.profiles import MODELS, profile
from ringred.buckets import MIB
from ringred.collectives.registry import Algorithm, lookup
from ringred.runtime.select import segments_for, share_bounds
from ringred.schedule.cost import simulate
from ringred.topology.model import Topology, flat

__all__ = ["RANKS", "STATED", "WAYS", "Scaled", "scaled"]

RANKS = (8, 64, 512, 1024, 3456)
WAYS = ("ring", "torus", "halving_doubling", "double_tree", "tree", "central")
STATED = "10 Gbit/s, 10 µs a message; a P100's times; float32; central: one server's traffic"

_NETWORK = 10e9 / 8
_ALPHA = 10e-6
_SIZES = (64 << 10, 1 * MIB, 4 * MIB, 16 * MIB)
_SEGMENT = 512 << 10  # as between hosts


class Scaled(NamedTuple):
    """The efficiency of a model's step by a way, against one rank alone."""

    model: str
    way: str
    ranks: int
    efficiency: float


def scaled(ranks: tuple[int, ...]) -> Iterator[list[Scaled]]:
    """All models by one way on so many ranks, for each of them."""
    costs = Costs(_ALPHA, 1 / _NETWORK, 0.0, 0.0, 0.0, _SEGMENT)
    for size in ranks:
        for way in WAYS:
            seconds_of = reduces(way, size)
            steps = {
                name: step_of(profile(name), 1.0, way, costs, Network(size, 10_000), seconds_of=seconds_of)
                for name in MODELS
            }
            yield [Scaled(name, way, size, profile(name).seconds / step.seconds) for name, step in steps.items()]


def reduces(way: str, size: int) -> Callable[[int], float]:
    """The seconds of an all-reduce of so many bytes."""
    entry, topology = lookup("all_reduce", way), flat(size, _ALPHA, 1 / _NETWORK, 0.0)
    if way in ("ring", "torus", "halving_doubling"):
        alike = way != "halving_doubling" or size & (size - 1) == 0
        return linear(way, entry.group(size), topology, _SIZES[0], _SIZES[-1], alike=alike)
    times = [_seconds(entry, size, nbytes, topology) for nbytes in _SIZES]
    slope = (times[-1] - times[-2]) / (_SIZES[-1] - _SIZES[-2])

    def seconds(nbytes: int) -> float:
        beyond = max(0, nbytes - _SIZES[-1])
        return float(numpy.interp(nbytes, _SIZES, times)) + slope * beyond

    return seconds


def _seconds(entry: Algorithm, size: int, nbytes: int, topology: Topology) -> float:
    group = entry.group(size, segments=segments_for(nbytes, _SEGMENT))
    bounds = share_bounds(nbytes, entry.units(group))
    return simulate(size, entry.steps(group), bounds, topology.link, topology.gamma, segment=_SEGMENT).seconds
