"""What many ranks would do: steps of the models on hosts of one rank each, by the simulator alone.

The links are stated, not calibrated: 10 Gbit/s, 10 µs a message, and nobody is in another's way. Of a bucket's
all-reduce two sizes are simulated, and others are on the line between them. Trees and one server are cut into
messages, for they send while they receive. A shard of a server on each rank (`direct`) takes as long as a ring here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lab.hosts import Network
from lab.predict import Costs, linear, step_of
from lab.profiles import MODELS, profile
from ringred.buckets import MIB
from ringred.collectives.registry import lookup
from ringred.topology.model import flat

__all__ = ["RANKS", "STATED", "WAYS", "Scaled", "scaled"]

RANKS = (8, 64, 512, 1024, 3456)
WAYS = ("ring", "torus", "halving_doubling", "double_tree", "tree", "central")
STATED = "10 Gbit/s, 10 µs a message; a P100's times; float32; central: one server's traffic"

_NETWORK = 10e9 / 8
_ALPHA = 10e-6
_SHORT, _LONG, _SEGMENT = 4 * MIB, 12 * MIB, MIB


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
    group = lookup("all_reduce", way).group(size)
    cut = way in ("tree", "double_tree", "central")
    alike = way in ("ring", "torus") or (way == "halving_doubling" and size & (size - 1) == 0)
    topology = flat(size, _ALPHA, 1 / _NETWORK, 0.0)
    return linear(way, group, topology, _SHORT, _LONG, alike=alike, segment=_SEGMENT if cut else None)
