"""Trains each model by torch's DDP on Gloo and by ringred's, and prints what differs, case by case, as JSON.

Needs torchrun. On two ranks sums have one order only, and everything must be equal to the bit; on more, it is compared
in double precision. An argument chooses cases.
"""

import inspect
import json
import os
import sys
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_differential_models import (
    MODELS,
    PLAIN,
    UNUSED,
    Checkpointed,
    Compiled,
    NeverUsed,
    convolutions,
    summed,
)
from torch import nn

import ringred

TORCHS = torch.nn.parallel.DistributedDataParallel


OURS = ringred.DistributedDataParallel


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


def delayed(model):
    named = [(name, p) for name, p in model.named_parameters() if name.startswith("5.")]
    return {"delay_all_reduce_named_params": named, "param_to_hook_all_reduce": model[0].weight}


def with_hook(name):
    def register(model):
        from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        if name == "power_sgd":
            # One bucket: with several, torch's hook has its second round started in an order that threads decide.
            state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5)
            model.register_comm_hook(state, powerSGD_hook)
        else:
            hooks = {"allreduce": default_hooks.allreduce_hook, "fp16": default_hooks.fp16_compress_hook}
            model.register_comm_hook(None, {**hooks, "noop": debugging_hooks.noop_hook}[name])

    return register


HOOKS = {"allreduce": PLAIN[:4], "fp16": PLAIN[:3], "noop": PLAIN[:3], "power_sgd": PLAIN[:1]}


def run(wrapper, build, options, loop, hook=None, compiled=False):
    """What each step gave: losses, gradients (None where there are none), and the parameters at the end."""
    same = callable(options) or options.get("init_sync", True)
    torch.manual_seed(dist.get_rank() if same else 0)  # rank 0's model is what counts
    module = build()
    options = options(module) if callable(options) else options
    model = wrapper(module, **options)
    if hook is not None:
        hook(model)
    runs = model
    if compiled:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        runs = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = []
    for loss in loop(runs, optimizer):
        gradients = {name: p.grad for name, p in module.named_parameters()}
        steps.append(
            (loss.detach().clone(), {n: None if g is None else g.detach().clone() for n, g in gradients.items()})
        )
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return steps, state


def apart(ours, theirs, tolerance):
    """The difference between two tensors, or Nones; None where there is none."""
    if ours is None or theirs is None:
        return None if ours is theirs else f"{ours} is not {theirs}"
    if ours.is_sparse != theirs.is_sparse:
        return f"{ours.layout} is not {theirs.layout}"
    ours, theirs = (t.to_dense() if t.is_sparse else t for t in (ours, theirs))
    if dist.get_world_size() == 2:
        same = torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs))
    else:
        greatest = max(1.0, torch.nan_to_num(theirs).abs().max().item()) if theirs.numel() else 1.0
        same = torch.allclose(ours, theirs, atol=tolerance * greatest, rtol=0, equal_nan=True)
    return None if same else f"apart by {(ours - theirs).abs().max().item():.3g}"


def compare(tolerance, *case, **more):
    (ours, our_state), (theirs, their_state) = run(OURS, *case, **more), run(TORCHS, *case, **more)
    assert len(ours) == len(theirs), "as many steps"
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if found := apart(mine[0], other[0], tolerance):
            return f"loss of step {step} {found}"
        for name in other[1]:
            if found := apart(mine[1][name], other[1][name], tolerance):
                return f"gradient of {name} in step {step} {found}"
    for name in their_state:
        if found := apart(our_state[name], their_state[name], tolerance):
            return f"{name} at the end {found}"
    return "equal"


def errors():
    """What both refuse, by the type of the exception."""

    def unused(wrapper):
        model = wrapper(NeverUsed())
        for inputs, targets in batches(2):
            loss_of(model, inputs, targets).backward()

    def twice(wrapper):
        model = wrapper(Checkpointed(True, times=2))
        for inputs, targets in batches(2):
            loss_of(model, inputs, targets).backward()

    def no_parameters(wrapper):
        wrapper(nn.ReLU())

    def hook_is_none(wrapper):
        wrapper(convolutions()).register_comm_hook(None, 1)

    def hook_annotated(wrapper):
        def hook(state: object, bucket: int):
            return None

        wrapper(convolutions()).register_comm_hook(None, hook)

    def hook_twice(wrapper):
        for _ in range(2):
            with_hook("noop")(model := wrapper(convolutions()))
            with_hook("noop")(model)

    def devices(wrapper):
        wrapper(convolutions(), device_ids=[0])

    def two_groups(wrapper):
        wrapper(convolutions(), process_group=dist.group.WORLD, device_mesh=dist.init_device_mesh("cpu", (2,)))

    def half_delayed(wrapper):
        wrapper(convolutions(), delay_all_reduce_named_params=[("0.weight", nn.Parameter(torch.ones(1)))])

    def unknown(wrapper):
        wrapper(convolutions(), bucket_cap=1)

    def join_throws(wrapper):
        model = wrapper(convolutions())
        with model.join(throw_on_early_termination=True):
            for inputs, targets in batches(2 + dist.get_rank()):
                loss_of(model, inputs, targets).backward()

    def uninitialized(wrapper):
        wrapper(nn.LazyLinear(3))

    found = {}
    for case in (
        *(unused, twice, no_parameters, hook_is_none, hook_annotated, hook_twice, devices, half_delayed, unknown),
        *(join_throws, uninitialized),
    ):
        raised = []
        for wrapper in (OURS, TORCHS):
            try:
                case(wrapper)
            except Exception as failure:
                raised.append(type(failure))
            else:
                raised.append(None)
        ours, theirs = raised
        same = theirs is not None and ours is not None and issubclass(ours, theirs)
        found[f"error {case.__name__}"] = "equal" if same else f"{ours} is not {theirs}"
    return found


def cases():
    known = inspect.signature(TORCHS.__init__).parameters
    for name, (build, table) in MODELS.items():
        for options in table:
            yield f"{name} {options}", (build, options, by_steps), {}, options
    for name, (loop, models, table) in LOOPS.items():
        for model in models:
            for options in table:
                yield f"{name} {model} {options}", (MODELS[model][0], options, loop), {}, options
    for name, table in HOOKS.items():
        for options in table:
            yield f"hook {name} {options}", (convolutions, options, by_steps), {"hook": with_hook(name)}, options
    if "delay_all_reduce_named_params" in known:
        yield "delayed", (convolutions, delayed, waiting), {}, {}
    for options in (PLAIN[0], PLAIN[3], {"gradient_as_bucket_view": True}):
        yield f"compiled {options}", (Compiled, options, by_steps), {"compiled": True}, options


def main():
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    if dist.get_world_size() > 2:
        torch.set_default_dtype(torch.float64)
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    known = inspect.signature(TORCHS.__init__).parameters
    found = {}
    for name, case, more, options in cases():
        if asked in name and set(options) <= set(known):
            try:
                found[name] = compare(1e-3 if "fp16" in name else 1e-6, *case, **more)
            except Exception as failure:
                found[name] = f"{type(failure).__name__}: {failure}"
    if not asked or asked.startswith("error"):
        found.update(errors())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    for rank, others in enumerate(everyone):
        for name, what in others.items():
            if what != "equal" and found[name] == "equal":
                found[name] = f"on rank {rank}: {what}"
    if dist.get_rank() == 0:
        print("DIFFERENTIAL", json.dumps(found))
    dist.barrier()
    # torch's DDP keeps the group's threads beyond destroy_process_group, and Gloo's may be letting a tensor go: at the
    # end of Python it takes the GIL for that, is ended there, and std::terminate aborts the process.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
