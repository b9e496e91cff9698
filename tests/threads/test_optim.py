"""The sharded optimizer against the same one whole, what it keeps, its checkpoints; and the linear-scaling rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import ringred
from ringred.communicator import Communicator
from ringred.errors import ModelMismatch
from ringred.optim import LinearScaling, ShardedOptimizer
from ringred.testing import run_ranks

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(20, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 3))
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
}


def wrapped(comm: Communicator, **options: Any) -> ringred.DistributedDataParallel:
    options = {"bucket_cap_mb": 0.002, **options}
    return ringred.DistributedDataParallel(copy.deepcopy(MODEL), process_group=comm, **options)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return F.cross_entropy(model(torch.randn(8, 20, generator=generator)), torch.arange(8) % 3)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """No weight decay for vectors, as is usual."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def trained(
    comm: Communicator, make: Callable[[Any], torch.optim.Optimizer], steps: range = range(6), **options: Any
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    model = wrapped(comm, **options)
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in steps:
        optimizer.zero_grad()
        with model.no_sync():
            loss_of(model, comm.rank, 100 + step).backward()
        loss_of(model, comm.rank, step).backward()
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.clip_grad_norm_(0.5)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    return [p.detach().clone() for p in model.parameters()], optimizer


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", KINDS)
def test_trains_as_the_same_optimizer_whole(name: str, size: int) -> None:
    kind, settings = KINDS[name]

    def body(comm: Communicator) -> tuple[list[Tensor], list[Tensor]]:
        sharded, _ = trained(comm, lambda model: ShardedOptimizer(model, kind, groups_of(model), **settings))
        whole, _ = trained(comm, lambda model: kind(groups_of(model), **settings))
        return sharded, whole

    results = run_ranks(body, size, "shm" if size > 1 else "local")
    for sharded, whole in results:
        for a, b, first in zip(sharded, whole, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert torch.equal(a, first), "replicas agree to the bit"


def bytes_of(optimizer: Any) -> int:
    states = optimizer.kept() if isinstance(optimizer, ShardedOptimizer) else optimizer.state.values()
    held = [value for state in states for value in state.values()]
    return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor) and value.dim())


def test_each_rank_keeps_its_part_of_the_state() -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        _, sharded = trained(comm, lambda model: ShardedOptimizer(model, torch.optim.Adam))
        _, whole = trained(comm, lambda model: torch.optim.Adam(model.parameters()))
        return bytes_of(sharded), bytes_of(whole)

    results = run_ranks(body, 4)
    assert {whole for _, whole in results} == {2 * 4 * sum(p.numel() for p in MODEL.parameters())}
    assert sum(part for part, _ in results) == results[0][1], "together they keep all of it, once"
    assert max(part for part, _ in results) <= results[0][1] // 4 + 64


def test_gradients_of_two_synchronised_backwards_add_up_and_a_step_uses_them_up() -> None:
    def body(comm: Communicator) -> None:
        model, other = wrapped(comm), wrapped(comm)
        optimizer, plain = ShardedOptimizer(model, torch.optim.SGD, lr=1.0), torch.optim.SGD(other.parameters(), lr=1.0)
        for each in (model, other):
            for step in range(2):
                loss_of(each, comm.rank, step).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        plain.step()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        loss_of(model, comm.rank, 3).backward()
        model.zero_grad()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)), "nothing to step by"

    run_ranks(body, 3)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_checkpoint_of_shares_resumes_to_the_bit(name: str) -> None:
    kind, settings = KINDS[name]

    def body(comm: Communicator) -> None:
        def make(model: Any) -> ShardedOptimizer:
            return ShardedOptimizer(model, kind, groups_of(model), **settings)

        model, again = wrapped(comm), wrapped(comm)
        first, second = make(model), make(again)
        for step in range(6):
            if step == 3:
                again.load_state_dict(copy.deepcopy(model.state_dict()))
                second.load_state_dict(copy.deepcopy(first.state_dict()))
                whole = second.full_state_dict(0)
                assert whole is None or len(whole["state"]) == len(list(again.parameters()))
                first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = 0.03
            loss_of(model, comm.rank, step).backward()
            first.step()
            if step >= 3:
                loss_of(again, comm.rank, step).backward()
                second.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        other = {**first.state_dict(), "rank": (comm.rank + 1) % comm.size}
        with pytest.raises(ModelMismatch, match=f"expected the state of rank {comm.rank}, got {other['rank']}"):
            second.load_state_dict(other)

    run_ranks(body, 3)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_whole_checkpoint_goes_to_any_number_of_ranks_and_to_an_optimizer_without_shares(name: str) -> None:
    kind, settings = KINDS[name]

    def make(model: Any) -> ShardedOptimizer:
        return ShardedOptimizer(model, kind, groups_of(model), **settings)

    def save(comm: Communicator) -> tuple[Any, Any]:
        model = wrapped(comm)
        optimizer = make(model)
        assert not (optimizer.full_state_dict(1) or {}).get("state"), "nothing before the first step"
        for step in range(3):
            loss_of(model, 0, step).backward()  # the same on all ranks: as one rank alone
            optimizer.step()
        return copy.deepcopy(model.module.state_dict()), optimizer.full_state_dict(1)

    (_, nothing), (parameters, state), _ = run_ranks(save, 3)
    assert nothing is None

    def go_on(comm: Communicator) -> list[Tensor]:
        model = wrapped(comm)
        model.module.load_state_dict(parameters)
        optimizer = make(model)
        optimizer.load_full_state_dict(copy.deepcopy(state))
        for step in range(3, 6):
            loss_of(model, 0, step).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    alone = copy.deepcopy(MODEL)
    alone.load_state_dict(parameters)
    plain = kind(groups_of(alone), **settings)
    plain.load_state_dict(copy.deepcopy(state))
    for step in range(3, 6):
        plain.zero_grad()
        loss_of(alone, 0, step).backward()
        plain.step()
    for result in run_ranks(go_on, 2):
        for a, b in zip(result, alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_shared_out_is_refused() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=r"treats each element by itself \(ASGD, .*got LBFGS"):
            ShardedOptimizer(wrapped(comm), torch.optim.LBFGS)
        for options in ({"find_unused_parameters": True}, {"static_graph": True}):
            with pytest.raises(ValueError, match="every gradient must come in every backward"):
                ShardedOptimizer(wrapped(comm, **options), torch.optim.SGD, lr=1.0)
        model = wrapped(comm)
        with pytest.raises(ValueError, match=r"expected all parameters of the model, but not '0\.bias'"):
            ShardedOptimizer(model, torch.optim.SGD, [model.module[0].weight], lr=1.0)
        loss_of(model, comm.rank, 0).backward()
        with pytest.raises(RuntimeError, match="before the first backward, or not at all"):
            ShardedOptimizer(model, torch.optim.SGD, lr=1.0)
        model = wrapped(comm)
        with pytest.raises(ValueError, match=r"but 1 of `groups` are none, the first of shape \[7\]"):
            ShardedOptimizer(model, torch.optim.SGD, [*model.parameters(), nn.Parameter(torch.ones(7))], lr=1.0)
        optimizer = ShardedOptimizer(model, torch.optim.SGD, lr=1.0)
        with pytest.raises(ValueError, match="has one already"):
            ShardedOptimizer(model, torch.optim.SGD, lr=1.0)
        with pytest.raises(ValueError, match="no group can be added"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        with pytest.raises(ringred.UnknownAlgorithm, match="reduce_scatter: no algorithm 'tree'"):
            ShardedOptimizer(wrapped(comm, algorithm="tree"), torch.optim.SGD, lr=1.0)
        with pytest.raises(RuntimeError, match="does not go with a ShardedOptimizer"), model.join():
            pass
        with pytest.raises(RuntimeError, match="does not go with a ShardedOptimizer"):
            model.register_comm_hook(None, lambda state, bucket: None)

    run_ranks(body, 2)


def test_parameters_that_were_moved_are_named_and_states_of_other_models_too() -> None:
    def body(comm: Communicator) -> None:
        for move in (
            lambda m: m.double(),
            lambda m: vector_to_parameters(parameters_to_vector(m.parameters()), m.parameters()),
        ):
            model = wrapped(comm)
            optimizer = ShardedOptimizer(model, torch.optim.SGD, lr=1.0)
            with torch.no_grad():
                move(model)
            with pytest.raises(RuntimeError, match=r"expected parameter '.*' where it was put"):
                optimizer.step()
        model = wrapped(comm)
        optimizer = ShardedOptimizer(model, torch.optim.Adam)
        model.module.load_state_dict(copy.deepcopy(MODEL.state_dict()))
        loss_of(model, comm.rank, 0).backward()
        optimizer.step()
        good = optimizer.full_state_dict(0)
        if good is None:
            return
        for change, text in (
            (lambda s: s["param_groups"][0]["params"].pop(), r"expected groups of \[8\] parameters, got \[7\]"),
            (lambda s: s["state"][0].update(exp_avg=torch.zeros(2)), r"'exp_avg' of parameter 0 to be \[33, 20\]"),
        ):
            bad = copy.deepcopy(good)
            change(bad)
            with pytest.raises(ModelMismatch, match=text):
                optimizer.load_full_state_dict(bad)

    run_ranks(body, 2)


def test_no_step_follows_by_gradients_that_were_dropped() -> None:
    def body(comm: Communicator) -> bool:
        model = wrapped(comm, check_finite=True)
        optimizer = ShardedOptimizer(model, torch.optim.SGD, lr=1.0)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ringred.NonFiniteGradient):
            (loss_of(model, comm.rank, 0) * (float("nan") if comm.rank else 1)).backward()
        optimizer.step()
        return all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))

    assert all(run_ranks(body, 2))


def test_the_rate_goes_up_to_its_multiple_and_on_from_there() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]}], lr=0.1)
    schedule = LinearScaling(optimizer, batch=1024, reference=256, warm_up=4, then=lambda at: 0.5 if at >= 6 else 1.0)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # Goyal et al.: from η = 0.1 to kη = 0.4.
    assert rates == pytest.approx([0.1, 0.175, 0.25, 0.325, 0.4, 0.4, 0.2, 0.2])
    again = LinearScaling(optimizer, batch=1, warm_up=0, then=lambda at: 7.0)
    again.load_state_dict(schedule.state_dict())
    optimizer.step()
    again.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * 7)
    with pytest.raises(ValueError, match="expected batch ≥ 1"):
        LinearScaling(optimizer, batch=0, warm_up=1)


def test_momentum_correction_makes_both_forms_of_momentum_one() -> None:
    class RateWithin(torch.optim.Optimizer):
        """Equation 10 of Goyal et al.: v ← mv + ηg, w ← w − v."""

        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    v = self.state[p].setdefault("v", torch.zeros_like(p))
                    v.mul_(0.9).add_(p.grad, alpha=group["lr"])
                    p.sub_(v)

    def run(kind: Callable[[Any], torch.optim.Optimizer], momentum: str | None) -> Tensor:
        parameter = nn.Parameter(torch.tensor([5.0], dtype=torch.float64))
        optimizer = kind([parameter])
        schedule = LinearScaling(
            optimizer, batch=512, warm_up=5, then=lambda at: 0.1 if at > 9 else 1.0, momentum=momentum
        )
        for _ in range(15):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
            schedule.step()
        return parameter.detach()

    torchs = run(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), None)
    assert torch.allclose(run(lambda p: RateWithin(p, 0.01), "v"), torchs)
    assert not torch.allclose(run(lambda p: RateWithin(p, 0.01), None), torchs)
