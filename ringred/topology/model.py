"""The machine model used to predict the time of schedules: ranks on hosts, α, β and λ of each link, γ of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringred.schedule.cost import Link
from ringred.topology.torus import coordinates

__all__ = ["Topology", "flat", "grid_links", "hosts"]


@dataclass(frozen=True, slots=True)
class Topology:
    """`size` ranks. α is in seconds a message, β in seconds a byte, γ in seconds a reduced byte, λ in seconds.

    A collective takes `call` seconds beside its messages. `distance[i]` is the link at distance `i`; `place[r]` are the
    coordinates of rank `r`. Two ranks are at the distance of the outermost coordinate in which they differ.
    """

    size: int
    distance: tuple[Link, ...]
    gamma: float
    place: tuple[tuple[int, ...], ...]
    name: str
    call: float = 0.0

    def link(self, sender: int, receiver: int) -> Link:
        """That from `sender` to `receiver`."""
        pairs = zip(self.place[sender], self.place[receiver], strict=True)
        differs = [dimension for dimension, (here, there) in enumerate(pairs) if here != there]
        return self.distance[differs[-1] if differs else 0]


def flat(size: int, alpha: float, beta: float, gamma: float, name: str = "flat") -> Topology:
    """A topology in which all pairs of ranks have the same link."""
    return Topology(size, ((alpha, beta),), gamma, tuple((rank,) for rank in range(size)), name)


def grid_links(grid: tuple[int, ...], links: Sequence[Link], gamma: float, name: str = "grid") -> Topology:
    """Ranks on a grid (X innermost) with one link for each dimension."""
    size = 1
    for extent in grid:
        size *= extent
    return Topology(size, tuple(links), gamma, tuple(coordinates(rank, grid) for rank in range(size)), name)


def hosts(
    host_of_rank: Sequence[int],
    inside: Link,
    between: Link,
    gamma: float,
    name: str = "hosts",
    call: float = 0.0,
) -> Topology:
    """Ranks on hosts: rank `r` on `host_of_rank[r]`; one kind of link inside a host, one between."""
    place = tuple((rank, host) for rank, host in enumerate(host_of_rank))
    return Topology(len(place), (inside, between), gamma, place, name, call)
