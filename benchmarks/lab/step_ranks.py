"""What each rank of the laboratory's step experiments does: trains replayed models, case by case.

A replayed layer sleeps until its backward is over, or keeps its core busy where its times are those of this machine,
and hands over a gradient of its true size. Rank 0 prints one JSON line a measured case: seconds a step, bytes of the
busiest host in each direction, seconds for which its reductions ran (ringred's), and how late a layer was.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ringred
from lab.cases import Case
from lab.costs import calibrated
from lab.profiles import Profile, read
from lab.record import load, record
from lab.served import in_turns
from lab.traffic import Traffic
from ringred.parameter_server.policies import parse
from ringred.parameter_server.policies.policy import FirstK

_USUAL = 3e-8  # seconds a byte of gradients, between hosts of 500 Mbit/s; progress is told by it


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gradient: Tensor, clock: _Clock, until: float) -> Tensor:
        ctx.gradient, ctx.clock, ctx.until = gradient, clock, until
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        ctx.clock.wait_until(ctx.until)
        return gradients[0], ctx.gradient[:], None, None, None  # nobody else has this view: it is not copied


class _Clock:
    """Times since the step began; `late` is the longest that a layer came after its time. A `busy` one has its core
    compute meanwhile, as a real layer does that what is received at the same time shares the core with."""

    def __init__(self, busy: bool) -> None:
        self.began, self.late = time.perf_counter(), 0.0
        self._numbers = torch.ones(1 << 14) if busy else None

    def start(self) -> None:
        self.began = time.perf_counter()

    def wait_until(self, seconds: float) -> None:
        end = self.began + seconds
        left = end - time.perf_counter()
        self.late = max(self.late, -left)
        if self._numbers is not None:
            while time.perf_counter() < end:
                self._numbers.mul_(1.0)
        elif left > 0:
            time.sleep(left)


class Replayed(nn.Module):
    """A model of a profile whose times are `dilation` times as long."""

    def __init__(self, model: Profile, dilation: float, busy: bool = False) -> None:
        super().__init__()
        self.clock = _Clock(busy)
        # All layers have the same memory as their gradients: to write to new memory takes time that is not dilated.
        self._gradient = torch.full((max(layer.elements for layer in model.layers),), 1e-3)
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(layer.elements)) for layer in model.layers])
        self.forward_seconds = model.forward * dilation
        ends, now = [], self.forward_seconds
        for seconds in reversed(model.backward):
            now += seconds * dilation
            ends.append(now)
        self.ends = ends[::-1]

    def forward(self, x: Tensor) -> Any:
        self.clock.start()
        self.clock.wait_until(self.forward_seconds)
        layer: Any = _Layer.apply
        for weight, until in zip(self.weights, self.ends, strict=True):
            x = layer(x, weight, self._gradient[: weight.numel()], self.clock, until)
        return x.sum()


def sharing(comm: ringred.Communicator, case: Case, module: nn.Module) -> nn.Module:
    """The module, its gradients shared by a collective."""
    caps: dict[str, Any] = {} if case.cap_mib is None else {"bucket_cap_mb": case.cap_mib}
    if case.way == "alone":
        return module
    if case.way == "gloo":
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, **caps)
    caps |= {"algorithm": case.way, "init_sync": False}
    return ringred.DistributedDataParallel(module, process_group=comm, gradient_as_bucket_view=True, **caps)


class Measured(NamedTuple):
    """Seconds of each step, the bytes of a step that this host sent and received, and the seconds of the last one for
    which some reduction of this rank was under way (0 where that is not known)."""

    times: list[float]
    moved: list[float]
    reducing: float = 0.0


def on_collectives(comm: ringred.Communicator, case: Case, module: nn.Module, steps: int) -> Measured:
    """Each step of all ranks together, after one, and where gradients are shared after two: in the second, buckets are
    laid out anew, in memory that is new. A collective takes as long as its last rank."""
    model, times, x = sharing(comm, case, module), [], torch.ones(1, requires_grad=True)

    def step() -> None:
        model(x).backward()  # without an optimizer, whose time is none here
        module.zero_grad()

    for _ in range(1 if case.way == "alone" else 2):
        step()
    comm.barrier()
    traffic = Traffic()
    for _ in range(steps):
        comm.barrier()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times)
    comm.all_reduce(slowest, "max")
    moved = [nbytes / steps for nbytes in traffic.since()]
    return Measured([float(took) for took in slowest], moved, reducing(model))


def reducing(model: nn.Module) -> float:
    """The seconds for which a reduction of the last backward was under way."""
    if not isinstance(model, ringred.DistributedDataParallel):
        return 0.0
    total = free = 0.0
    for bucket in model.overlap_report().buckets:
        total += bucket.end_ms - max(bucket.start_ms, free)
        free = bucket.end_ms
    return total / 1e3


def on_servers(comm: ringred.Communicator, case: Case, module: nn.Module, steps: int) -> Measured:
    """The seconds in which all workers together finish a mini-batch each that counts.

    Where all take part in each update, or those that do not are cancelled: by the updates that the first worker sees.
    Else by the rate of each, over as many of its own mini-batches, from the second on, while all others are at theirs;
    its host's bytes are those of all that time, in which the others may do more or fewer.
    """
    kind, _, name = case.way.partition(":")
    policy = parse(name)
    assert isinstance(policy, FirstK), f"{policy} is not measured"
    workers = len(set(comm.hosts)) if kind == "hosts" else comm.size
    several = policy.gradients_per_update(workers)
    turns = in_turns(policy, workers)
    enough = 2 + (steps if turns else 2 * steps)
    # One that is cancelled late may not see each version: two more.
    updates = enough + 2 * policy.others_cancelled if turns else None
    x = torch.ones(1, requires_grad=True)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01)

    placement: dict[str, Any] = {"comm": comm, "shards": 1 if kind == "server" else None}
    placement |= {"hierarchy": "host" if kind == "hosts" else "flat", "updates": updates}
    begun, traffic, moved, now = list[tuple[float, int]](), Traffic(), [0, 0], 0.0
    ranks = comm.split(comm.hosts[comm.rank] if kind == "hosts" else comm.rank)
    with ringred.ParameterServer(module, optimizer, policy, **placement) as server:
        while server.pull():
            now, moved = time.perf_counter(), traffic.since()
            if turns or len(begun) < enough:
                begun.append((now, server.version))
                if len(begun) == 2:
                    traffic, moved = Traffic(), [0, 0]
            elif not turns and all_have(ranks, server, workers, enough):
                break
            module(x).backward()
            server.push()
    ranks.close()
    (began, first), (ended, last) = begun[min(1, len(begun) - 1)], begun[-1]
    took = ended - began
    counted = (last - first) * several / workers if turns else len(begun) - 2
    rate = torch.tensor([counted / took if took else 0.0], dtype=torch.float64)
    if turns:
        comm.broadcast(rate, 0)
    else:
        comm.all_reduce(rate, "avg")
    seconds = 1 / rate.item()
    return Measured([seconds], [nbytes * seconds / (now - began) if took else 0.0 for nbytes in moved])


def all_have(ranks: ringred.Communicator, server: ringred.ParameterServer, workers: int, count: int) -> bool:
    """Whether each worker has pushed as many mini-batches; the same on all `ranks` of this one."""
    done = torch.zeros(1)
    if ranks.rank == 0:
        applied = server.report().applied
        done.fill_(min(applied.get(number, 0) for number in range(workers)) >= count)
    ranks.broadcast(done, 0)
    return bool(done.item())


def module_of(comm: ringred.Communicator, case: Case) -> nn.Module:
    """A replayed model; a real one, "real:NAME"; or one recorded just now, on all hosts at once, "replayed:NAME"."""
    kind, _, name = case.model.rpartition(":")
    if kind == "real":
        return load(name)
    if kind == "replayed":
        comm.barrier()
        return Replayed(record(name, load(name)), 1.0, busy=True)
    slowness = case.slowness if comm.hosts[comm.rank] == comm.hosts[-1] else 1.0
    return Replayed(read(case.model, case.batch), case.dilation * slowness)


def effort(case: Case) -> float:
    """About how long a case takes beside others: its computation, or its gradients' way where that is longer."""
    if case.model.partition(":")[0] in ("real", "replayed"):
        return 1.0
    model = read(case.model, case.batch)
    return max(model.seconds * case.dilation * case.slowness, model.nbytes * _USUAL)


def measured(comm: ringred.Communicator, case: Case, steps: int) -> dict[str, Any]:
    """One case; collective."""
    module = module_of(comm, case)
    comm.barrier()
    times, moved, busy = (on_servers if ":" in case.way else on_collectives)(comm, case, module, steps)
    late = module.clock.late if isinstance(module, Replayed) else 0.0
    numbers = torch.tensor([*moved, busy, late], dtype=torch.float64)
    comm.all_reduce(numbers, "max")
    sent, received, busy, late = numbers.tolist()
    found = {"seconds": statistics.median(times)} | ({"low": min(times), "high": max(times)} if len(times) > 1 else {})
    return found | {"sent": sent, "received": received, "reducing": busy, "late": late}


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    cases = [Case(**case) for case in task["cases"]]
    torch.set_num_threads(1)
    comm = ringred.init()
    peer = any(case.way == "gloo" for case in cases)
    if peer:
        import torch.distributed as dist

        dist.init_process_group("gloo", rank=comm.rank, world_size=comm.size)
    servers = any(":" in case.way for case in cases)
    calibrations = list[dict[str, Any]]()

    def calibrate() -> None:
        calibrations.append(calibrated(comm, servers))
        if comm.rank == 0:
            print(json.dumps({"calibrations": calibrations}), flush=True)

    calibrate()
    done = list(itertools.accumulate(map(effort, cases)))
    for case, part in zip(cases, done, strict=True):
        found = measured(comm, case, task["steps"])
        if comm.rank == 0:
            print(json.dumps({**asdict(case), **found}), json.dumps({"done": part / done[-1]}), sep="\n", flush=True)
    calibrate()
    if peer:
        dist.destroy_process_group()
    comm.close()


if __name__ == "__main__":
    main()
