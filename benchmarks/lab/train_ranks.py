"""What each rank of the laboratory's training experiment does: trains a real model until it is good enough.

Rank 0 prints one JSON line a training: seconds and mini-batches of a rank until the test set was first answered well
enough, without the time that looking took, and the accuracy (digits) or loss in nats a byte (GPT) at the end. On
collectives all ranks wait while rank 0 looks, and end when it is enough; workers of a parameter server go on.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred
from examples import train_digits
from examples.gpt import text_gpt
from ringred.parameter_server.policies import parse

_LOOK_EVERY = 10  # mini-batches


class Task(NamedTuple):
    """A model, its batches of a rank, its loss, how it is stepped on so many ranks, and what is good enough."""

    make: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[Any, int], torch.optim.Optimizer]
    quality: Callable[[nn.Module], float]
    enough: Callable[[float], bool]
    most: int  # mini-batches of each rank; one rank alone makes those of all


def _digits() -> Task:
    train, test = train_digits.digits()
    images, labels = train.tensors
    size = train_digits.BATCH

    def batches(rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))[rank::ranks]
            for at in range(0, len(order) - size + 1, size):
                yield images[order[at : at + size]], labels[order[at : at + size]]

    def quality(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean().item()

    return Task(
        train_digits.make_model,
        batches,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        lambda parameters, ranks: torch.optim.SGD(parameters, lr=0.05 * ranks),
        quality,
        lambda accuracy: accuracy >= 0.97,
        300,
    )


def _gpt() -> Task:
    held = list(text_gpt.batches(10_007, 6))

    def quality(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(model(text).item() for text in held) / len(held)

    return Task(
        text_gpt.make_model,
        lambda rank, ranks: text_gpt.batches(rank, 100_000),
        lambda model, text: model(text),
        lambda parameters, ranks: torch.optim.AdamW(parameters, lr=2e-3, foreach=False),
        quality,
        lambda loss: loss <= 2.3,
        150,
    )


TASKS = {"digits": _digits, "gpt": _gpt}


class _Watch:
    """Rank 0's clock, which stands still while the model is looked at."""

    def __init__(self, task: Task) -> None:
        self.task, self.began = task, time.perf_counter()
        self.reached: dict[str, float | None] | None = None
        self.quality = 0.0

    def look(self, model: nn.Module, batches: int) -> None:
        stopped = time.perf_counter()
        self.quality = self.task.quality(model)
        if self.reached is None and self.task.enough(self.quality):
            self.reached = {"seconds": stopped - self.began, "batches": batches}
        self.began += time.perf_counter() - stopped

    def look_at(self, model: nn.Module, kept: Sequence[tuple[float, int, dict[str, Tensor]]]) -> None:
        """The same of parameters that were kept, with the moment and the mini-batches, while others went on."""
        for moment, batches, state in kept:
            model.load_state_dict(state)
            self.quality = self.task.quality(model)
            if self.reached is None and self.task.enough(self.quality):
                self.reached = {"seconds": moment - self.began, "batches": batches}


def by_collectives(comm: ringred.Communicator, task: Task, way: str, watch: _Watch) -> None:
    """Data-parallel, in step; "alone" is one rank, and the others rest."""
    ranks = 1 if way == "alone" else comm.size
    done, most = torch.zeros(1), task.most * comm.size // ranks
    if way != "alone" or comm.rank == 0:
        inner = task.make()
        model: nn.Module = inner
        if way == "gloo":
            model = nn.parallel.DistributedDataParallel(inner)
        elif way != "alone":
            model = ringred.DistributedDataParallel(inner, process_group=comm, algorithm=way)
        optimizer = task.optimizer(inner.parameters(), ranks)
        for number, batch in enumerate(itertools.islice(task.batches(comm.rank, ranks), most), 1):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            if number % _LOOK_EVERY == 0:
                if comm.rank == 0:
                    watch.look(inner, number)
                    done.fill_(watch.reached is not None)
                if ranks > 1:
                    comm.broadcast(done)
                if done.item():
                    break
    comm.barrier()


def on_servers(comm: ringred.Communicator, task: Task, policy: str, watch: _Watch) -> None:
    """On a parameter server, a shard on each host. A step is that of one gradient, times the gradients of an update."""
    rule, model = parse(policy), task.make()
    several = rule.gradients_per_update(comm.size)
    updates = task.most * comm.size // several

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return task.optimizer(parameters, several)

    kept: list[tuple[float, int, dict[str, Tensor]]] = []
    with ringred.ParameterServer(model, optimizer, rule, updates=updates, comm=comm) as server:
        for number, batch in enumerate(task.batches(comm.rank, comm.size)):
            goes_on = server.pull()
            if comm.rank == 0 and (number % _LOOK_EVERY == 0 or not goes_on):
                kept.append((time.perf_counter(), number, copy.deepcopy(model.state_dict())))
            if not goes_on:
                break
            task.loss(model, batch).backward()
            server.push()
    watch.look_at(task.make(), kept)


def main() -> None:
    given: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    comm = ringred.init()
    if "gloo" in given["ways"]:
        import torch.distributed as dist

        dist.init_process_group("gloo")
    cases = list(itertools.product(given["trainings"], given["ways"]))
    for done, (name, way) in enumerate(cases, 1):
        task = TASKS[name]()
        comm.barrier()
        watch = _Watch(task)
        kind, _, policy = way.partition(":")
        if kind == "servers":
            on_servers(comm, task, policy, watch)
        else:
            by_collectives(comm, task, way, watch)
        if comm.rank == 0:
            reached = watch.reached or {"seconds": None, "batches": None}
            found = {"training": name, "way": way, **reached, "quality": watch.quality}
            print(json.dumps(found), json.dumps({"done": done / len(cases)}), sep="\n", flush=True)
    if "gloo" in given["ways"]:
        dist.destroy_process_group()
    comm.close()


if __name__ == "__main__":
    main()
