"""Policies: local SGD, fused optimizers, hooks of one's own; what they refuse, keep, and do when they fail."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred
from ringred import hooks
from ringred.communicator import Communicator
from ringred.testing import run_ranks
from tests.threads.hook_models import POLICIES, batch, small


def test_local_sgd_averages_parameters_every_few_steps() -> None:
    def body(comm: Communicator) -> list[bool]:
        model = ringred.DistributedDataParallel(small(), process_group=comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        policy = hooks.LocalSGD(comm, optimizer, start=2, period=3)
        model.register_comm_hook(policy, hooks.comm_hook)
        alike = []
        for step in range(9):
            inputs, targets = batch(comm, step)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            try:
                model.check_desync()
            except ringred.ReplicasDiverged:
                alike.append(False)
            else:
                alike.append(True)
        return alike

    #                          averaged | own steps, and parameters averaged at the 2nd, 5th and 8th
    assert run_ranks(body, 3) == [[True, True, False, False, True, False, False, True, False]] * 3


def test_local_sgd_within_a_group_keeps_averaging_there() -> None:
    def body(comm: Communicator) -> Tensor:
        pair = comm.split(comm.rank // 2)
        model = ringred.DistributedDataParallel(small(), process_group=comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.register_comm_hook(hooks.LocalSGD(comm, optimizer, period=100, within=pair), hooks.comm_hook)
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(batch(comm, step)[0]), batch(comm, step)[1]).backward()
            optimizer.step()
        return next(model.parameters()).detach()

    first, second, third, fourth = run_ranks(body, 4)
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p)])
@pytest.mark.parametrize("by", [None, "fp16"])
def test_a_fused_optimizer_steps_as_one_behind_backward(make: Any, by: str | None) -> None:
    def body(comm: Communicator) -> bool:
        after = []
        for fused in (True, False):
            model = ringred.DistributedDataParallel(small(), process_group=comm, bucket_cap_mb=0.005)
            head, body = list(model.parameters())[-2:], list(model.parameters())[:-2]
            optimizer = make([{"params": body}, {"params": head, "lr": 0.01}])
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            inner = None if by is None else POLICIES[by](comm)
            if fused:
                policy: hooks.Policy | None = hooks.FusedOptimizer(comm, optimizer, inner)
            else:
                policy = inner
            if policy is not None:
                model.register_comm_hook(policy, hooks.comm_hook)
            for step in range(5):
                inputs, targets = batch(comm, step)
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                if not fused:
                    optimizer.step()
                schedule.step()
            after.append(([p.detach() for p in model.parameters()], [p.grad for p in model.parameters()]))
        (fused_parameters, fused_gradients), (parameters, gradients) = after
        assert all(torch.equal(a, b) for a, b in zip(fused_gradients, gradients, strict=True))
        return all(torch.equal(a, b) for a, b in zip(fused_parameters, parameters, strict=True))

    assert all(run_ranks(body, 2))


def test_a_policy_that_raises_is_told_to_all() -> None:
    class Broken(hooks.Policy):
        def reduce(self, comm: Communicator, gradients: hooks.Gradients) -> Tensor:
            if comm.rank == 1:
                raise ArithmeticError("no more")
            comm.all_reduce(gradients.flat)
            return gradients.flat

    def body(comm: Communicator) -> str:
        model = ringred.DistributedDataParallel(small(), process_group=comm)
        model.register_comm_hook(Broken(comm), hooks.comm_hook)
        with pytest.raises(RuntimeError) as raised:
            model(batch(comm, 0)[0]).sum().backward()
        return str(raised.value)

    texts = run_ranks(body, 3)
    assert texts[1] == "rank 1: Broken on bucket 0: ArithmeticError: no more"
    assert all("rank 1" in text and "no more" in text for text in (texts[0], texts[2])), texts


def test_hooks_of_ones_own() -> None:
    def plain(state: list[Any], bucket: Any) -> Any:
        state.append((bucket.index(), bucket.is_last(), [g.shape for g in bucket.gradients()], bucket.parameters()))
        return torch.futures.Future()

    def wrong(state: Any, bucket: Any) -> Any:
        future: Any = torch.futures.Future()
        future.set_result(torch.ones(1))
        return future

    def body(comm: Communicator) -> None:
        for hook, text in (
            (lambda state, bucket: 3, "expected a torch.futures.Future, got int"),
            (wrong, "expected its future to hold a tensor of 4414 elements, got 1 elements"),
        ):
            model = ringred.DistributedDataParallel(small(), process_group=comm)
            model.register_comm_hook(None, hook)
            with pytest.raises(TypeError, match=text):
                model(batch(comm, 0)[0]).sum().backward()

        seen: list[Any] = []

        def noted(state: list[Any], bucket: Any) -> Any:
            future = plain(state, bucket)
            replaced = bucket.buffer() * 2
            bucket.set_buffer(replaced)
            assert torch.equal(bucket.gradients()[0].flatten(), replaced[: bucket.gradients()[0].numel()])
            future.set_result(replaced)
            return future

        model = ringred.DistributedDataParallel(small(), process_group=comm, bucket_cap_mb=0.005)
        model.register_comm_hook(seen, noted)
        local = copy.deepcopy(model.module)
        for wrapped in (model, local):
            wrapped(batch(comm, 0)[0]).sum().backward()
        for got, alone in zip(model.parameters(), local.parameters(), strict=True):
            assert torch.equal(got.grad, 2 * alone.grad)
        assert [number for number, *_ in seen] == list(range(len(model.bucket_plan())))
        assert [last for _, last, *_ in seen] == [False] * (len(seen) - 1) + [True]
        assert [[p.shape for p in parameters] for *_, parameters in seen] == [shapes for _, _, shapes, _ in seen]
        with pytest.raises(RuntimeError, match="only be called once"):
            model.register_comm_hook(seen, noted)
        late = ringred.DistributedDataParallel(small(), process_group=comm)
        late(batch(comm, 0)[0]).sum().backward()
        with pytest.raises(RuntimeError, match="before the first backward"):
            late.register_comm_hook(seen, noted)

    run_ranks(body, 2)


def test_policies_refuse_what_makes_no_sense() -> None:
    def body(comm: Communicator) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
        for make in (
            lambda: hooks.Half(comm, torch.float32),
            lambda: hooks.Int8(comm, 0),
            lambda: hooks.TopK(comm, 0),
            lambda: hooks.PowerSGD(comm, 0),
            lambda: hooks.LocalSGD(comm, optimizer, period=0),
        ):
            with pytest.raises(ValueError, match="expected"):
                make()

    run_ranks(body, 1)


def test_policies_are_for_one_model_of_their_ranks() -> None:
    def body(comm: Communicator) -> None:
        def model(**options: Any) -> ringred.DistributedDataParallel:
            return ringred.DistributedDataParallel(small(), process_group=comm, **options)

        policy = hooks.Half(comm)
        model().register_comm_hook(policy, hooks.comm_hook)
        with pytest.raises(ValueError, match="Half serves a model already"):
            model().register_comm_hook(policy, hooks.comm_hook)
        with pytest.raises(ValueError, match=r"was made for rank 0 of 1, but .* by rank . of 2"):
            model().register_comm_hook(hooks.Half(comm.split(comm.rank)), hooks.comm_hook)
        wrapped = model()
        others = torch.optim.SGD([*list(wrapped.parameters())[1:], nn.Parameter(torch.ones(1))], lr=1.0)
        with pytest.raises(ValueError, match="lacks 1 of them and has 1 others"):
            wrapped.register_comm_hook(hooks.FusedOptimizer(comm, others), hooks.comm_hook)
        for options in ({"find_unused_parameters": True}, {"check_finite": True}):
            wrapped = model(**options)
            fused = hooks.FusedOptimizer(comm, torch.optim.SGD(wrapped.parameters(), lr=1.0))
            with pytest.raises(ValueError, match="acts before it is known whether gradients count"):
                wrapped.register_comm_hook(fused, hooks.comm_hook)
        local = hooks.LocalSGD(comm, others)
        with pytest.raises(ValueError, match="expected a policy that reduces gradients, got LocalSGD"):
            hooks.FusedOptimizer(comm, others, by=local)
        with pytest.raises(ValueError, match="say nothing to it"):
            model(deterministic=True, algorithm="direct").register_comm_hook(hooks.Half(comm), hooks.comm_hook)
        wrapped = model()
        wrapped.register_comm_hook(local, hooks.comm_hook)
        with pytest.raises(RuntimeError, match=r"join\(\) does not go with"), wrapped.join():
            pass

    run_ranks(body, 2)


@pytest.mark.parametrize("name", ["int8", "top_k", "power_sgd"])
def test_what_a_policy_keeps_goes_into_a_checkpoint(name: str) -> None:
    def body(comm: Communicator) -> bool:
        def steps(model: nn.Module, count: int) -> list[Tensor]:
            for step in range(count):
                model.zero_grad()
                F.cross_entropy(model(batch(comm, step)[0]), batch(comm, step)[1]).backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        model = ringred.DistributedDataParallel(small(), process_group=comm)
        policy = POLICIES[name](comm)
        model.register_comm_hook(policy, hooks.comm_hook)
        steps(model, 3)
        again = ringred.DistributedDataParallel(small(), process_group=comm, bucket_plan=model.bucket_plan())
        other = POLICIES[name](comm)
        other.load_state_dict(copy.deepcopy(policy.state_dict()))
        again.register_comm_hook(other, hooks.comm_hook)
        strange = {**policy.state_dict(), "rank": comm.rank + 1}
        with pytest.raises(ringred.ModelMismatch, match="expected the state of rank"):
            other.load_state_dict(strange)
        return all(torch.equal(a, b) for a, b in zip(steps(model, 1), steps(again, 1), strict=True))

    assert all(run_ranks(body, 2))


def test_a_hook_around_a_policy_is_called() -> None:
    def body(comm: Communicator) -> tuple[int, bool]:
        calls = []

        def doubled(state: hooks.Policy, bucket: Any) -> Any:
            calls.append(bucket.index())
            return hooks.comm_hook(state, bucket).then(lambda future: future.value() * 2)

        found = []
        for hook in (hooks.comm_hook, doubled):
            model = ringred.DistributedDataParallel(small(), process_group=comm, bucket_cap_mb=0.005)
            model.register_comm_hook(hooks.Half(comm), hook)
            F.cross_entropy(model(batch(comm, 0)[0]), batch(comm, 0)[1]).backward()
            found.append([p.grad for p in model.parameters()])
        return len(calls), all(torch.equal(2 * a, b) for a, b in zip(*found, strict=True))

    assert run_ranks(body, 2) == [(2, True)] * 2
