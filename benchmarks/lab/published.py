"""Scaling efficiency in print, and what the simulator makes of it, from stated speeds and links: nothing is fitted.

The model: every bucket is all-reduced when backward has filled it, over links of α and β; hosts of four or eight
processors share their network links. What it leaves out is said beside each row.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab.predict import Costs, linear, step_of
from lab.profiles import Processor, Profile, profile
from ringred.collectives.registry import lookup
from ringred.topology.model import grid_links

__all__ = ["PUBLISHED", "Published", "simulated"]


@dataclass(frozen=True)
class Published:
    """A row of print: `efficiency` on `processors`, in percent, against one processor; links in bytes a second."""

    work: str
    model: str
    processors: int
    efficiency: float
    grid: tuple[int, ...]
    batch: int
    flops: float
    inside: float
    between: float
    left_out: str
    bytes_an_element: int = 4


# Goyal et al.: Caffe2, 8 P100 a server, NVLink inside, 50 Gbit/s between; the batch of 32 takes 0.155 s there.
# Mikami et al.: V100 in 16 bits, 4 a node, NVLink inside, two EDR (25 GB/s) between; a torus.
# Horovod: P100, 4 a server, 25 Gbit/s RoCE; Inception V3 in batches of 64, VGG-16 in batches of 32.
PUBLISHED = (
    Published(
        "Goyal et al. 2017", "resnet50", 256, 90.0, (8, 32), 32, 4.5e12, 20e9, 6.25e9, "input, stragglers, host staging"
    ),
    Published(
        "Mikami et al. 2018 v2", "resnet50", 1024, 84.75, (32, 32), 32, 14e12, 25e9, 25e9, "batch control, input", 2
    ),
    Published(
        "Mikami et al. 2018 v1", "resnet50", 1088, 91.6, (34, 32), 32, 14e12, 25e9, 25e9, "batch control, input", 2
    ),
    Published("Horovod 2018", "inception", 512, 90.0, (4, 128), 64, 4.5e12, 10e9, 3.1e9, "fusion cycles, host staging"),
    Published("Horovod 2018", "vgg16", 512, 68.0, (4, 128), 32, 4.5e12, 10e9, 3.1e9, "fusion cycles, host staging"),
)


def simulated(row: Published, alpha: float = 10e-6) -> float:
    """The efficiency that the simulator gives, in percent."""
    model: Profile = profile(row.model, row.batch, Processor(row.work, row.flops))
    size = row.processors
    x = row.grid[0]
    # The processors of a host share its links: as many of their columns cross them at once.
    shared = 4 if x % 4 == 0 and x > 8 else x if x <= 8 else 4
    links = [(alpha, 1 / row.inside), (alpha, shared / row.between)] if x <= 8 else [(alpha, shared / row.between)] * 2
    topology = grid_links(row.grid, links, 0.0)
    name = "torus" if len(row.grid) > 1 else "ring"
    scale = row.bytes_an_element / 4
    seconds_of = linear(name, lookup("all_reduce", name).group(size, grid=row.grid), topology, 1 << 20, 32 << 20)
    costs = Costs(alpha, 1 / row.between, 0.0, 0.0, 0.0, 1 << 20)
    step = step_of(model, 1.0, name, size, costs, seconds_of=lambda nbytes: seconds_of(int(nbytes * scale)))
    return 100 * model.seconds / step.seconds
