"""Deals the samples of an epoch to the ranks, and anew when the ranks change, so that each is still used once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ringred.communicator import Communicator
from ringred.data_parallel.recovery import Change, Recovery

__all__ = ["Deal", "ElasticSampler"]


@dataclass(frozen=True, slots=True)
class Deal:
    """How the samples of an epoch that are left are dealt to ranks, in batches of `batch`. Rank r first has the batches
    `ahead[r]`, which it had fetched before; then some of its own, so that all have as many; then each gets one in turn.
    These are of `samples`, in order. Where there are too few, those of `filler` follow, not counted as used; if it
    `drops`, not to fill up the last round, which is left out. If it is `closed`, there are no rounds."""

    samples: Tensor
    filler: Tensor
    ahead: tuple[tuple[tuple[int, ...], ...], ...]
    batch: int
    drops: bool = False
    closed: bool = False
    _most: int = field(init=False)
    _starts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        most = max(map(len, self.ahead))
        starts = [0]
        for fetched in self.ahead:
            starts.append(starts[-1] + (most - len(fetched)) * self.batch)
        object.__setattr__(self, "_most", most)
        object.__setattr__(self, "_starts", tuple(starts))

    @property
    def count(self) -> int:
        """The batches of each rank."""
        left = 0 if self.closed else max(0, self.samples.numel() - self._starts[-1])
        a_round = self.batch * len(self.ahead)
        return self._most + (left // a_round if self.drops else -(-left // a_round))

    def samples_of(self, rank: int, number: int) -> tuple[int, ...]:
        """A batch of a rank; what fills it up is −1 − sample."""
        if number < len(self.ahead[rank]):
            return self.ahead[rank][number]
        first = self._place(rank, number)
        batch = self.samples[first : first + self.batch].tolist()
        past = max(0, first - self.samples.numel())
        fill = [(past + at) % self.filler.numel() for at in range(self.batch - len(batch))]
        return (*batch, *(-1 - sample for sample in self.filler[fill].tolist()))

    def _place(self, rank: int, number: int) -> int:
        """Where in `samples` a batch begins that is not ahead."""
        if number < self._most:
            return self._starts[rank] + (number - len(self.ahead[rank])) * self.batch
        return self._starts[-1] + ((number - self._most) * len(self.ahead) + rank) * self.batch

    def left(self, used: Sequence[int]) -> Tensor:
        """The samples that are left once rank r has used its first `used[r]` batches."""
        keep = torch.ones(self.samples.numel(), dtype=torch.bool)
        returned: list[int] = []
        for rank, count in enumerate(used):
            fetched = self.ahead[rank]
            returned += [sample for batch in fetched[count:] for sample in batch if sample >= 0]
            for number in range(len(fetched), min(count, self.count)):
                place = self._place(rank, number)
                keep[place : place + self.batch] = False
        return torch.cat([torch.tensor(returned, dtype=torch.int64), self.samples[keep]])


class _Model(Protocol):
    """A DistributedDataParallel, as this module sees one."""

    @property
    def comm(self) -> Communicator:
        """Its ranks of now."""

    @property
    def recovery(self) -> Recovery | None:
        """What goes on after failures."""

    @property
    def steps(self) -> int:
        """The backwards that all ranks have finished."""


class ElasticSampler(Sampler[list[int]]):
    """Batches of `batch_size` indices into `dataset` (or 0 .. dataset - 1) for this rank of `model`, for the
    `batch_sampler` of a DataLoader. In an epoch each sample is used once, by one rank; so that all ranks have as many
    batches, the first samples of the order fill up the last round, or, with `drop_last`, that round is left out.

    When ranks fail or join, what no finished step has used, and no rank that is left has fetched, is dealt anew: a
    DataLoader goes on with what its workers have fetched. `batches_per_step` is the number of batches of one
    synchronised backward, where gradients are accumulated.
    """

    def __init__(
        self,
        dataset: Sized | int,
        batch_size: int,
        model: _Model,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        batches_per_step: int = 1,
    ) -> None:
        self.length = dataset if isinstance(dataset, int) else len(dataset)
        if self.length < 1 or batch_size < 1 or batches_per_step < 1:
            raise ValueError(
                f"ElasticSampler: expected samples, a batch size and batches per step ≥ 1, got {self.length}, "
                f"{batch_size}, {batches_per_step}"
            )
        self.model, self.batch_size, self.batches_per_step = model, batch_size, batches_per_step
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch, self._rank, self._finished = 0, model.comm.rank, False
        self._drawn = 0  # batches that this rank has fetched of the deal
        self._since = 0  # the step after which it was made
        self._deal = self._new_deal(self._order(0), [()] * model.comm.size)
        if model.recovery is not None:
            model.recovery.enrol(self)

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + epoch))

    def _new_deal(
        self, samples: Tensor, ahead: Sequence[tuple[tuple[int, ...], ...]], drawn: int = 0, closed: bool = False
    ) -> Deal:
        self._drawn, self._since, self._over = drawn, self.model.steps, False
        return Deal(samples, self._order(self.epoch), tuple(ahead), self.batch_size, self.drop_last, closed)

    def set_epoch(self, epoch: int) -> None:
        """Begins `epoch`, unless it has begun."""
        if epoch != self.epoch:
            self.epoch, self._finished = epoch, False
            self._deal = self._new_deal(self._order(epoch), [()] * self.model.comm.size)

    def __len__(self) -> int:
        """The batches that this rank has still to fetch."""
        return self._deal.count - self._drawn

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        if self._finished:  # it was over when the state was saved that was loaded
            self._finished = False
            return
        if not len(self):  # the epoch is over, and the program makes another one of it
            self._deal = self._new_deal(self._order(epoch), [()] * self.model.comm.size)
        while self.epoch == epoch and len(self):
            number, self._drawn = self._drawn, self._drawn + 1
            batch = self._deal.samples_of(self._rank, number)
            yield [sample if sample >= 0 else -1 - sample for sample in batch]
        self._over = self._over or self.epoch == epoch

    @property
    def epoch_is_over(self) -> bool:
        """Whether a state was loaded that has nothing left of its epoch."""
        return self._finished

    # ------------------------------------------------------------------ other ranks

    def tells(self) -> dict[str, int]:
        """How far this rank has come."""
        steps = self.model.steps
        return {"epoch": self.epoch, "drawn": self._drawn, "done": self._done(), "over": self._over, "steps": steps}

    def _done(self) -> int:
        return (self.model.steps - self._since) * self.batches_per_step

    def follow(self, change: Change) -> None:
        """Deals what is left to the ranks of `change`."""
        told = [one for one, was in zip(change.told, change.was, strict=True) if one is not None and was is not None]
        epoch = max(one["epoch"] for one in told)
        if epoch > self.epoch:  # this rank has yet to finish the last step of the epoch before
            self.epoch = epoch
            self._deal = self._new_deal(self._order(epoch), [()] * change.size)
        there = [one if one["epoch"] == epoch else {"drawn": 0, "done": 0} for one in told]
        done = max(one["done"] for one in there)
        before, used = self._deal, [done] * change.size
        ahead: list[tuple[tuple[int, ...], ...]] = []
        for one, was in zip(change.told, change.was, strict=True):
            if one is None or was is None:
                ahead.append(())  # it begins with the next step
                continue
            used[was] = max(done, one["drawn"] if one["epoch"] == epoch else 0)
            ahead.append(tuple(before.samples_of(was, number) for number in range(done, used[was])))
        # Whoever's program fetches no more is given no more: what others had is then left out of this epoch.
        closed, over = any(one.get("over", False) for one in there), self._over
        self._rank = change.was.index(self._rank)
        self._deal = self._new_deal(before.left(used), ahead, len(ahead[self._rank]), closed)
        # Who has not finished the last step of the others does so now, and it is none of the new deal's.
        self._over, self._since = over, max(one["steps"] for one in told)

    def adopt(self, comm: Communicator) -> None:
        """The ranks of its model are its own."""

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What the steps so far have left of the epoch. Whoever loads it may be of another number of ranks."""
        left = self._deal.left([self._done()] * len(self._deal.ahead))
        return {"epoch": self.epoch, "seed": self.seed, "left": left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was called."""
        self.epoch, self.seed = state["epoch"], state["seed"]
        self._deal = self._new_deal(state["left"], [()] * self.model.comm.size)
        self._finished = not len(self)

    def handed_over(self) -> dict[str, Any]:
        """What a rank that joins needs."""
        deal = self._deal
        return {
            "epoch": self.epoch,
            "seed": self.seed,
            "left": deal.samples,
            "ahead": deal.ahead,
            "closed": deal.closed,
        }

    def take_over(self, state: dict[str, Any]) -> None:
        """Goes on as a rank that has joined."""
        self.epoch, self.seed = state["epoch"], state["seed"]
        self._rank = self.model.comm.rank
        self._deal = self._new_deal(state["left"], state["ahead"], closed=state["closed"])
