"""Simulates one rank in the place of all, where all do the same at the same time: for thousands of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ringred.schedule.cost import Cost, Event, Job, Link, OnTheWay, Receiving, Sending, Simulation
from ringred.schedule.ir import Step

__all__ = ["simulate_alike"]


def simulate_alike(
    size: int,
    schedule: Callable[[int], Iterable[Step]],
    bounds: Sequence[tuple[int, int]],
    link: Callable[[int, int], Link],
    gamma: float,
) -> Cost:
    """The cost of `schedule`, as `cost.simulate` has it for whole messages, if all ranks are alike: each sends and
    receives as much as rank 0 in each of its turns, over the same kind of links, and what a rank gets from a peer as
    that one's n-th message is as long as its own n-th. So are ring, direct, a torus whose links differ by dimension,
    and halving-doubling of 2^n ranks, if units are equal.

    Raises `ValueError` where the second or the last rank is seen to do something else than rank 0.
    """
    job = Job(schedule, bounds, [0.0] * size)
    mine = _turns(job, 0)
    for rank in {1 % size, size - 1}:
        if _turns(job, rank) != mine:
            raise ValueError(f"expected ranks that are alike, got a rank {rank} that does something else than rank 0")
    return _Alike(size, [job], link, gamma, 0.0).run()[0]


def _turns(job: Job, rank: int) -> list[tuple[object, ...]]:
    """What a rank does, without whom with."""
    return [
        (type(event), event.nbytes, len(event.peers) if isinstance(event, Receiving) else 1)
        for event in job.events(rank)
        if isinstance(event, Sending | Receiving)
    ]


class _Alike(Simulation):
    """A simulation that runs rank 0 only."""

    def __init__(
        self, size: int, jobs: Sequence[Job], link: Callable[[int, int], Link], gamma: float, call: float
    ) -> None:
        super().__init__(size, jobs, link, gamma, call)
        (self.job,) = jobs
        self.numbers: dict[int, deque[int]] = {}  # by peer: which of its messages are to rank 0
        self.left: list[OnTheWay] = []  # when each message of rank 0 has

    def _finished(self) -> int:
        for event in self.events[0]:
            self._happens(0, event)
        return self.size

    def _happens(self, rank: int, event: Event) -> bool:
        if isinstance(event, Receiving):
            for peer in event.peers:
                number = self._of_peer(peer).popleft()
                if number >= len(self.left):
                    raise ValueError(f"rank 0 waits for message {number} of rank {peer}, and has not sent its own")
                self.on_the_way[peer, rank] = deque([self.left[number]])
        happened = super()._happens(rank, event)
        if isinstance(event, Sending):
            self.left.append(self.on_the_way[rank, event.peer].pop())
        return happened

    def _of_peer(self, peer: int) -> deque[int]:
        if peer not in self.numbers:
            sends = (event for event in self.job.events(peer) if isinstance(event, Sending))
            self.numbers[peer] = deque(number for number, event in enumerate(sends) if event.peer == 0)
        return self.numbers[peer]
