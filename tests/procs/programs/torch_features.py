"""What people build on torch.distributed, on the backend in argv: prints what each came to, for comparison with Gloo.

Needs torchrun. A second argument names one feature.
"""

import json
import shutil
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FEATURES = {}


def feature(function):
    FEATURES[function.__name__] = function
    return function


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def batch(step=0):
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + step)
    return torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator)


def trained(model, optimizer=None, steps=4):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@feature
def ddp():
    return trained(DistributedDataParallel(small_model()))


@feature
def ddp_with_our_hook():
    """torch's DDP on a process group of whatever backend, its gradients reduced by ringred."""
    import ringred
    from ringred.hooks import all_reduce_hook

    model = DistributedDataParallel(small_model())
    model.register_comm_hook(ringred.init(), all_reduce_hook)
    return trained(model)


@feature
def fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = small_model()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = trained(model, torch.optim.Adam(model.parameters(), lr=0.01))
    return losses, sum(p.full_tensor().double().sum().item() for p in model.parameters())


@feature
def functional_collectives():
    import torch.distributed._functional_collectives as functional

    world, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    mine = torch.arange(2.0 * size) + rank
    return [
        functional.all_reduce(mine, "sum", world).tolist(),
        functional.all_reduce(mine, "avg" if dist.get_backend() != "gloo" else "sum", world).sum().item()
        * (size if dist.get_backend() != "gloo" else 1),
        functional.all_gather_tensor(mine, 0, world).tolist(),
        functional.reduce_scatter_tensor(mine, "sum", 0, world).tolist(),
        functional.all_to_all_single(mine, None, None, world).tolist(),
        functional.broadcast(mine, 1, world).tolist(),
        [t.tolist() for t in functional.all_reduce_coalesced([mine, mine + 1], "sum", world)],
        [t.tolist() for t in functional.all_gather_into_tensor_coalesced([mine, mine + 1], world)],
        [t.tolist() for t in functional.reduce_scatter_tensor_coalesced([mine, mine + 1], "sum", [0, 0], world)],
    ]


@feature
def tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(small_model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    inputs, targets = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pipelined(kind):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    part = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    stage = PipelineStage(part, rank, size, torch.device("cpu"))
    schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](stage, 4, loss_fn=F.mse_loss)
    generator = torch.Generator().manual_seed(7)
    inputs, targets = torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)
    losses = []
    for _ in range(2):
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets, losses=losses)
    return [loss.item() for loss in losses], part[0].weight.grad.double().sum().item()


@feature
def pipeline_gpipe():
    return pipelined("gpipe")


@feature
def pipeline_1f1b():
    return pipelined("1f1b")


@feature
def zero_redundancy_optimizer():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(small_model())
    return trained(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01))


@feature
def fp16_hook():
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model = DistributedDataParallel(small_model())
    model.register_comm_hook(None, fp16_compress_hook)
    return trained(model)


@feature
def power_sgd_hook():
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    model = DistributedDataParallel(small_model())
    model.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2), powerSGD_hook)
    return trained(model, steps=6)


@feature
def join():
    from torch.distributed.algorithms.join import Join

    model = DistributedDataParallel(small_model())
    losses = []
    with Join([model]):
        for step in range(3 + dist.get_rank()):
            inputs, targets = batch(step)
            model.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            losses.append(loss.item())
    return losses, model.module[0].weight.grad.double().sum().item()


@feature
def compiled_ddp():
    return trained(torch.compile(DistributedDataParallel(small_model()), backend="aot_eager"))


@feature
def distributed_checkpoint():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded():
        return fully_shard(small_model(), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    model = sharded()
    trained(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folders[0])
    again = sharded()
    state = {"model": again.state_dict()}
    dcp.load(state, checkpoint_id=folders[0])
    again.load_state_dict(state["model"])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folders[0])
    return trained(again, torch.optim.SGD(again.parameters(), lr=0.1), steps=2)


def main():
    backend, *wanted = sys.argv[1:]
    warnings.simplefilter("ignore")
    dist.init_process_group(backend)
    found = {}
    for name in wanted or FEATURES:
        try:
            found[name] = FEATURES[name]()
        except Exception as failure:
            found[name] = f"{type(failure).__name__}: {failure}"
            print(f"{name}: {found[name]}", file=sys.stderr)
            if wanted:
                raise
        dist.barrier()
    print(json.dumps({"rank": dist.get_rank(), "found": found}) + "\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
