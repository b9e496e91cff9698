"""Trains each model by torch's DDP on Gloo, or by ringred's, and prints what differs, case by case, as JSON.

Needs torchrun, twice: `torch FOLDER` leaves in FOLDER what the other, `ringred FOLDER`, is compared with; each has
processes of its own, so that what one breaks is not taken for the other's. On two ranks sums have one order only, and
everything must be equal to the bit; on more, it is compared in double precision. A third argument chooses cases.
"""

import inspect
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from ddp_differential_loops import LOOPS, batches, by_steps, loss_of, waiting
from ddp_differential_models import (
    MODELS,
    PLAIN,
    Checkpointed,
    Compiled,
    NeverUsed,
    convolutions,
)
from torch import nn

import ringred

WRAPPERS = {"torch": torch.nn.parallel.DistributedDataParallel, "ringred": ringred.DistributedDataParallel}
KNOWN = inspect.signature(WRAPPERS["torch"].__init__).parameters  # arguments that this torch has


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


def compare(tolerance, mine, other):
    """What differs between two results of `run`; or what was raised in the place of one, which none of them should."""
    if raised := [result for result in (mine, other) if isinstance(result, str)]:
        return f"raised: {', '.join(raised)}"
    (ours, our_state), (theirs, their_state) = mine, other
    assert len(ours) == len(theirs), "as many steps"
    for step, ((our_loss, our_gradients), (loss, gradients)) in enumerate(zip(ours, theirs, strict=True)):
        if found := apart(our_loss, loss, tolerance):
            return f"loss of step {step} {found}"
        for name in gradients:
            if found := apart(our_gradients[name], gradients[name], tolerance):
                return f"gradient of {name} in step {step} {found}"
    for name in their_state:
        if found := apart(our_state[name], their_state[name], tolerance):
            return f"{name} at the end {found}"
    return "equal"


def errors(wrapper):
    """The type of the exception by which each mistake is refused; None if it is not."""

    def unused():
        model = wrapper(NeverUsed())
        for inputs, targets in batches(2):
            loss_of(model, inputs, targets).backward()

    def twice():
        model = wrapper(Checkpointed(True, times=2))
        for inputs, targets in batches(2):
            loss_of(model, inputs, targets).backward()

    def no_parameters():
        wrapper(nn.ReLU())

    def hook_is_none():
        wrapper(convolutions()).register_comm_hook(None, 1)

    def hook_annotated():
        def hook(state: object, bucket: int):
            return None

        wrapper(convolutions()).register_comm_hook(None, hook)

    def hook_twice():
        for _ in range(2):
            with_hook("noop")(model := wrapper(convolutions()))
            with_hook("noop")(model)

    def devices():
        wrapper(convolutions(), device_ids=[0])

    def half_delayed():
        wrapper(convolutions(), delay_all_reduce_named_params=[("0.weight", nn.Parameter(torch.ones(1)))])

    def unknown():
        wrapper(convolutions(), bucket_cap=1)

    def join_throws():
        model = wrapper(convolutions())
        with model.join(throw_on_early_termination=True):
            for inputs, targets in batches(2 + dist.get_rank()):
                loss_of(model, inputs, targets).backward()

    def uninitialized():
        wrapper(nn.LazyLinear(3))

    raised = {}
    for case in (
        *(unused, twice, no_parameters, hook_is_none, hook_annotated, hook_twice, devices, half_delayed, unknown),
        *(join_throws, uninitialized),
    ):
        raised[f"error {case.__name__}"] = None
        try:
            case()
        except Exception as failure:
            raised[f"error {case.__name__}"] = type(failure)
    return raised


def cases():
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
    if "delay_all_reduce_named_params" in KNOWN:
        yield "delayed", (convolutions, delayed, waiting), {}, {}
    for options in (PLAIN[0], PLAIN[3], {"gradient_as_bucket_view": True}):
        yield f"compiled {options}", (Compiled, options, by_steps), {"compiled": True}, options


def trained(wrapper, asked):
    """What each case gave by this wrapper, by its name."""
    given = {}
    for name, case, more, options in cases():
        if asked in name and set(options) <= set(KNOWN):
            try:
                given[name] = run(wrapper, *case, **more)
            except Exception as failure:
                given[name] = f"{type(failure).__name__}: {failure}"
    if not asked or asked.startswith("error"):
        given.update(errors(wrapper))
    return given


def differences(ours, theirs):
    """By case, "equal" or what is not, on any rank."""
    found = {}
    for name, other in theirs.items():
        try:
            if name.startswith("error"):
                mine = ours[name]
                same = other is not None and mine is not None and issubclass(mine, other)
                found[name] = "equal" if same else f"{mine} is not {other}"
            else:
                found[name] = compare(1e-3 if "fp16" in name else 1e-6, ours[name], other)
        except Exception as failure:  # all ranks say what they found
            found[name] = f"{type(failure).__name__}: {failure}"
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    for rank, others in enumerate(everyone):
        for name, what in others.items():
            if what != "equal" and found[name] == "equal":
                found[name] = f"on rank {rank}: {what}"
    return found


def main():
    whose, folder, asked = sys.argv[1], Path(sys.argv[2]), "".join(sys.argv[3:])
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if dist.get_world_size() > 2:
        torch.set_default_dtype(torch.float64)
    given = trained(WRAPPERS[whose], asked)
    if whose == "torch":
        torch.save(given, folder / f"{rank}.pt")
        dist.barrier()
        # torch's DDP keeps the group's threads beyond destroy_process_group, and Gloo's may be letting a tensor go: it
        # takes the GIL for that, Python's end ends it there, and std::terminate aborts the process.
        os._exit(0)
    found = differences(given, torch.load(folder / f"{rank}.pt", weights_only=False))
    if rank == 0:
        print("DIFFERENTIAL", json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
