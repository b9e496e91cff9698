"""ElasticSampler: each sample of an epoch is used once by one rank, whoever fails or joins meanwhile."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import ringred
from ringred.data_parallel.recovery import Change


@dataclass
class Comm:
    rank: int
    size: int


class Model:
    def __init__(self, rank: int, size: int) -> None:
        self.comm, self.steps, self.recovery = Comm(rank, size), 0, None


def make(size: int, length: int, batch: int, **options: Any) -> list[ringred.ElasticSampler]:
    return [ringred.ElasticSampler(length, batch, Model(rank, size), **options) for rank in range(size)]


def change(samplers: list[ringred.ElasticSampler], left: list[int], joining: int) -> list[ringred.ElasticSampler]:
    """The ranks `left` go on, and others join."""
    told = [samplers[rank].tells() for rank in left] + [None] * joining
    was = [*left, *[None] * joining]
    before = len(samplers)
    after = [samplers[rank] for rank in left]
    for rank, sampler in enumerate(after):
        sampler.follow(Change(before, was, told))
        sampler.model.comm = Comm(rank, len(was))
    for rank in range(len(left), len(was)):
        model = Model(rank, len(was))
        model.steps = after[0].model.steps
        new = ringred.ElasticSampler(samplers[0].length, samplers[0].batch_size, model, drop_last=after[0].drop_last)
        new.take_over(after[0].handed_over())
        after.append(new)
    return after


def run_epoch(seed: int, length: int, batch: int, drop_last: bool = False, ahead: int = 1) -> tuple[list[int], int]:
    """Trains an epoch with ranks that fail and join at random, each up to `ahead` batches ahead of its steps. Returns
    the samples of all steps that were finished, and of how many batches these were."""
    chosen = random.Random(seed)
    samplers = make(4, length, batch, seed=seed, drop_last=drop_last)
    everyone = list(samplers)  # kept, so that no two have the same id
    iterators = {id(one): iter(one) for one in samplers}
    queues: dict[int, list[list[int]]] = {id(one): [] for one in samplers}
    used: list[int] = []
    batches = 0
    while True:
        for one in samplers:
            while len(queues[id(one)]) < ahead and (found := next(iterators[id(one)], None)) is not None:
                queues[id(one)].append(found)
        if not any(queues[id(one)] for one in samplers):
            return used, batches
        if chosen.random() < 0.3:  # in the middle of a step, or between two
            left = sorted(chosen.sample(range(len(samplers)), chosen.randint(1, len(samplers))))
            samplers = change(samplers, left, chosen.randint(0, 2))
            everyone += samplers
            for one in samplers:
                iterators.setdefault(id(one), iter(one))
                queues.setdefault(id(one), [])
            continue
        assert all(queues[id(one)] for one in samplers), "all ranks make as many steps"
        for one in samplers:
            taken = queues[id(one)].pop(0)
            assert len(taken) == batch
            used += taken
            batches += 1
            one.model.steps += 1


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_every_sample_is_used_once_whoever_fails_or_joins(seed: int, ahead: int) -> None:
    length, batch = 997, 4
    used, batches = run_epoch(seed, length, batch, ahead=ahead)
    missing = length - len(set(used))
    # Where workers have fetched the whole epoch, what a rank that failed then had is left out.
    assert missing == 0 if ahead == 1 else missing <= 8 * ahead * batch
    twice = len(used) - len(set(used))
    assert twice == batches * batch - length + missing
    assert twice <= 8 * (ahead + 1) * batch, "what fills up the last round is all that is used twice"


@pytest.mark.parametrize("seed", range(4))
def test_no_sample_twice_where_the_last_round_is_dropped(seed: int) -> None:
    used, _ = run_epoch(seed, 997, 4, drop_last=True)
    assert len(used) - len(set(used)) <= 4 * 6, "only a rank that joins in the last steps may repeat some"
    assert len(set(used)) > 900


def test_without_failures_it_deals_as_a_distributed_sampler() -> None:
    samplers = make(3, 20, 2, shuffle=False)
    assert [list(one) for one in samplers] == [
        [[0, 1], [6, 7], [12, 13], [18, 19]],
        [[2, 3], [8, 9], [14, 15], [0, 1]],
        [[4, 5], [10, 11], [16, 17], [2, 3]],
    ]
    assert len(make(3, 20, 2)[0]) == 4
    assert len(make(3, 20, 2, drop_last=True)[0]) == 3


def test_epochs_are_shuffled_alike_on_all_ranks_and_differ() -> None:
    first, second = make(2, 50, 5, seed=3)
    orders = []
    for epoch in range(2):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        orders.append([index for batch in (*first, *second) for index in batch])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1]


def test_a_checkpoint_goes_on_with_another_number_of_ranks() -> None:
    samplers = make(4, 100, 5, seed=1)
    used: list[int] = []
    for one in samplers:
        turns = iter(one)
        for _ in range(2):
            used += next(turns)
            one.model.steps += 1
    state = samplers[0].state_dict()
    assert isinstance(state["left"], torch.Tensor)
    others = make(3, 100, 5)
    for one in others:
        one.load_state_dict(state)
        used += [index for batch in one for index in batch]
    assert set(used) == set(range(100))
    assert len(used) == 40 + 60


@pytest.mark.parametrize("arguments", [(0, 4), (10, 0)])
def test_bad_arguments(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected samples, a batch size and batches per step ≥ 1"):
        ringred.ElasticSampler(*arguments, Model(0, 1))


def test_an_epoch_that_was_over_when_it_was_saved_is_not_made_again() -> None:
    (one,) = make(1, 20, 5)
    for _ in one:
        one.model.steps += 1
    state = one.state_dict()
    (other,) = make(1, 20, 5)
    other.load_state_dict(state)
    assert list(other) == []
    other.set_epoch(1)
    assert len(list(other)) == 4
