"""The training loops of ddp_differential.py, with the models and arguments that each is run with."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_differential_models import PLAIN, UNUSED, summed
from torch import nn

STEPS = 10


def batches(steps=STEPS, seed=0):
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + 100 * dist.get_rank() + step)
        yield torch.randn(6, 4, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator)


def loss_of(model, inputs, targets):
    return F.cross_entropy(summed(model(inputs)), targets % 5)


def by_steps(model, optimizer):
    """The usual loop."""
    for inputs, targets in batches():
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        yield loss
        optimizer.step()


def gradients_stay(model, optimizer):
    """zero_grad leaves zeros, and every third step adds to the gradients of the one before."""
    for step, (inputs, targets) in enumerate(batches()):
        if step % 3:
            optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, inputs, targets)
        loss.backward()
        yield loss
        optimizer.step()


def accumulating(model, optimizer):
    """Two passes without synchronisation before each with it."""
    for step, (inputs, targets) in enumerate(batches(3 * STEPS)):
        with model.no_sync() if step % 3 < 2 else nullcontext():
            loss = loss_of(model, inputs, targets) / 3
            loss.backward()
        yield loss
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def two_forwards(model, optimizer):
    """Two forwards before one backward of both."""
    for inputs, targets in batches():
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets) + loss_of(model, inputs.flip(0), targets)
        loss.backward()
        yield loss
        optimizer.step()


def penalised(model, optimizer):
    """A gradient penalty: a backward through a backward, of gradients with respect to the inputs."""
    for inputs, targets in batches():
        optimizer.zero_grad()
        inputs.requires_grad_()
        loss = loss_of(model, inputs, targets)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        loss = loss + slope.square().sum()
        loss.backward()
        yield loss
        optimizer.step()


def scaled(model, optimizer):
    """GradScaler, with an overflow on one rank in the fourth step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for step, (inputs, targets) in enumerate(batches()):
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        blown_up = loss * (float("inf") if step == 3 and dist.get_rank() == 0 else 1)
        scaler.scale(blown_up).backward()
        yield loss
        scaler.step(optimizer)
        scaler.update()


def clipped(model, optimizer):
    for inputs, targets in batches():
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        yield loss
        optimizer.step()


def evaluating(model, optimizer):
    """An evaluation between the steps, on rank 0 only by the module itself."""
    for step, (inputs, targets) in enumerate(batches()):
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        yield loss
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(inputs)
            if dist.get_rank() == 0:
                model.module(inputs)
        model.train()
        if step % 2 and dist.get_rank() == 0:
            loss_of(model.module, inputs, targets).backward()  # a look at a local gradient, thrown away


def uneven(model, optimizer, **options):
    """Rank r has 2 r inputs less than the last."""
    with model.join(**options):
        for inputs, targets in batches(STEPS - 2 * (dist.get_world_size() - 1 - dist.get_rank())):
            optimizer.zero_grad()
            loss = loss_of(model, inputs, targets)
            loss.backward()
            yield loss
            optimizer.step()
    yield sum(p.detach().abs().double().sum() for p in model.parameters())


def uneven_by_active(model, optimizer):
    yield from uneven(model, optimizer, divide_by_initial_world_size=False)


def uneven_then_even(model, optimizer):
    """Not for models with buffers: those of torch's DDP come from another rank after join() than before it."""
    yield from uneven(model, optimizer)
    yield from by_steps(model, optimizer)


def waiting(model, optimizer):
    """torch's DDP does not wait for the delayed all-reduce; what comes behind it does."""
    for loss in by_steps(model, optimizer):
        dist.barrier()
        yield loss


LOOPS = {
    "gradients_stay": (gradients_stay, ["cnn", "resnet_batchnorm"], PLAIN[:3]),
    "no_sync": (accumulating, ["cnn", "tied_transformer", "resnet_batchnorm", "sparse_embedding"], PLAIN[:3]),
    "no_sync_unused": (accumulating, ["unused_by_rank", "unused_by_step", "never_used"], UNUSED[:2]),
    "two_forwards": (two_forwards, ["cnn", "tied_transformer"], PLAIN[:4]),
    "double_backward": (penalised, ["cnn", "shared_module"], PLAIN[:4]),
    "grad_scaler": (scaled, ["cnn", "bf16_autocast"], PLAIN[:3]),
    "clipped": (clipped, ["cnn"], PLAIN[:3]),
    "evaluating": (evaluating, ["resnet_batchnorm"], PLAIN[:4]),
    "join": (uneven, ["cnn", "resnet_batchnorm"], PLAIN[:3]),
    "join_unused": (uneven, ["never_used"], UNUSED[:2]),
    "join_then_even": (uneven_then_even, ["cnn"], PLAIN[:3]),
    "join_by_active": (uneven_by_active, ["cnn"], PLAIN[:3]),
}
