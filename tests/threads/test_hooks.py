"""Communication hooks: what they make of gradients, what they send, and that what they leave out comes later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred
from ringred import hooks
from ringred.communicator import Communicator
from ringred.data_parallel.compression import dequantised, largest, quantised
from ringred.testing import run_ranks

torch.manual_seed(0)
SMALL = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 30), nn.Tanh(), nn.Linear(30, 4))


def small() -> nn.Module:
    return copy.deepcopy(SMALL)  # ranks are threads, and share the random numbers


def batch(comm: Communicator, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * comm.rank + step)
    return torch.randn(16, 40, generator=generator), torch.randint(4, (16,), generator=generator)


def gradients_by(
    comm: Communicator, policy: Callable[[Communicator], hooks.Policy] | None, steps: int = 1, **options: Any
) -> list[list[Tensor]]:
    """The gradients of each of `steps` backwards of the same inputs, with parameters that stay as they are."""
    model = ringred.DistributedDataParallel(small(), process_group=comm, bucket_cap_mb=0.005, **options)
    if policy is not None:
        model.register_comm_hook(policy(comm), hooks.comm_hook)
    found = []
    for _ in range(steps):
        model.zero_grad()
        inputs, targets = batch(comm, 0)
        F.cross_entropy(model(inputs), targets).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return found


POLICIES: dict[str, Callable[[Communicator], hooks.Policy]] = {
    "fp16": hooks.Half,
    "bf16": lambda comm: hooks.Half(comm, torch.bfloat16),
    "int8": lambda comm: hooks.Int8(comm, block=64),
    "top_k": lambda comm: hooks.TopK(comm, 0.05),
    "power_sgd": lambda comm: hooks.PowerSGD(comm, rank=2),
}
# How near one gradient comes to the mean, and the mean of many to it, relative to its norm.
NEAR = {"fp16": (1e-3, 1e-3), "bf16": (1e-2, 1e-2), "int8": (0.02, 1e-3), "top_k": (1.0, 0.15), "power_sgd": (0.9, 0.1)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("as_views", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_each_comes_near_the_mean_and_what_it_leaves_out_comes_later(name: str, as_views: bool, size: int) -> None:
    steps = 60 if name in ("top_k", "power_sgd") else 12

    def body(comm: Communicator) -> tuple[list[Tensor], list[list[Tensor]]]:
        return gradients_by(comm, None)[0], gradients_by(comm, POLICIES[name], steps, gradient_as_bucket_view=as_views)

    results = run_ranks(body, size, "shm")
    wanted = torch.cat([g.flatten() for g in results[0][0]])
    got = [torch.cat([g.flatten() for g in step]) for step in results[0][1]]
    once, in_the_mean = NEAR[name]
    assert (got[0] - wanted).norm() <= once * wanted.norm()
    # Error feedback: over many steps of the same gradient the mean of what was applied comes to it.
    assert (torch.stack(got).mean(0) - wanted).norm() <= in_the_mean * wanted.norm()
    for _, other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other[-1], results[0][1][-1], strict=True)), "replicas agree"


def bytes_of(name: str | None, size: int, model: Callable[[], nn.Module], inputs: Callable[[int], Tensor]) -> int:
    """Bytes that a rank sends for one backward."""

    def body(comm: Communicator) -> int:
        wrapped = ringred.DistributedDataParallel(model(), process_group=comm, bucket_cap_mb=1, algorithm="direct")
        policy = None
        if name is not None:
            policy = POLICIES[name](comm)
            wrapped.register_comm_hook(policy, hooks.comm_hook)
        counters = comm.counters if policy is None else policy.counters
        wrapped(inputs(comm.rank)).sum().backward()  # buckets are laid out anew after the first
        wrapped.zero_grad()
        outputs = wrapped(inputs(comm.rank))
        before = counters.bytes_sent
        outputs.sum().backward()
        return counters.bytes_sent - before

    return run_ranks(body, size)[0]


@pytest.mark.parametrize(
    ("name", "least", "most"), [("fp16", 0.5, 0.5), ("bf16", 0.5, 0.5), ("int8", 0.25, 0.27), ("power_sgd", 0, 0.02)]
)
@pytest.mark.parametrize("size", [2, 4])
def test_compressed_bytes_are_what_travels(name: str, least: float, most: float, size: int) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))

    def inputs(rank: int) -> Tensor:
        return torch.randn(4, 512, generator=torch.Generator().manual_seed(rank))

    whole = bytes_of(None, size, model, inputs)
    assert whole == 2 * (size - 1) * 4 * sum(p.numel() for p in model().parameters()) // size
    assert least * whole <= bytes_of(name, size, model, inputs) <= most * whole + 64


def test_top_k_sends_eight_bytes_for_each_hundredth_element() -> None:
    POLICIES["top_1"] = lambda comm: hooks.TopK(comm, 0.01)
    try:
        sent = bytes_of("top_1", 2, lambda: nn.Linear(1000, 100), lambda rank: torch.randn(4, 1000))
    finally:
        del POLICIES["top_1"]
    assert sent == 8 * 1001  # of 100,100 elements: 2 % of the bytes of an all-reduce


def test_quantised_blocks_are_within_half_a_step() -> None:
    blocks = torch.randn(7, 32) * torch.logspace(-20, 20, 7).unsqueeze(1)
    blocks[3] = 0
    left_out = torch.empty_like(blocks)
    values, scales = quantised(blocks, left_out)
    again = dequantised(values, scales, torch.empty_like(blocks))
    torch.testing.assert_close(again + left_out, blocks)
    assert values.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert (left_out.abs() <= 0.5001 * scales.unsqueeze(1)).all()
    assert not again[3].any()
    blocks[5, 3] = float("nan")
    values, scales = quantised(blocks, left_out)
    assert torch.isnan(dequantised(values, scales, again)[5]).all(), "nobody takes it for a number"
    assert torch.isfinite(left_out).all()


@pytest.mark.parametrize("elements", [50, 100_000])
def test_the_largest_are_found_by_sample_or_without(elements: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for values in (
        torch.randn(elements, generator=generator),
        torch.arange(elements).float() - 7,  # the sample sees all of it
        torch.cat([torch.zeros(elements - 9), torch.ones(9)]),  # the sample sees nothing of it
        torch.ones(elements),
    ):
        places, found = largest(values, 10)
        assert torch.equal(values[places], found)
        assert places.unique().numel() == 10
        assert torch.equal(found.abs().sort().values, values.abs().topk(10).values.sort().values)
    values[3] = float("nan")
    assert torch.isnan(largest(values, 10)[1]).sum() == 1


@pytest.mark.parametrize("name", ["int8", "top_k", "power_sgd"])
def test_an_overflow_is_told_to_all_and_is_over_with_the_next_step(name: str) -> None:
    def body(comm: Communicator) -> tuple[bool, bool]:
        model = ringred.DistributedDataParallel(small(), process_group=comm)
        model.register_comm_hook(POLICIES[name](comm), hooks.comm_hook)
        finite = []
        for step in range(3):
            model.zero_grad()
            loss = model(batch(comm, step)[0]).sum() * (float("inf") if step == 1 and comm.rank == 0 else 1)
            loss.backward()
            finite.append(all(bool(torch.isfinite(p.grad).all()) for p in model.parameters()))
        return finite[1], finite[2]

    assert run_ranks(body, 2) == [(False, True)] * 2


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


@pytest.mark.parametrize("name", ["fp16", "int8", "top_k", "power_sgd"])
def test_complex_gradients_and_empty_parameters(name: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.weight = nn.Parameter(torch.randn(30, 20, dtype=torch.complex64, generator=generator))
            self.empty = nn.Parameter(torch.empty(0, 7))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex64) @ self.weight).abs() + self.empty.sum()

    module = Odd()

    def body(comm: Communicator) -> float:
        found = []
        for policy in (None, POLICIES[name](comm)):
            model = ringred.DistributedDataParallel(copy.deepcopy(module), process_group=comm, bucket_cap_mb=1e-6)
            if policy is not None:
                model.register_comm_hook(policy, hooks.comm_hook)
            total = torch.zeros(30, 20, dtype=torch.complex64)
            for _ in range(1 if policy is None else 40):
                model.zero_grad()
                model(torch.randn(9, 30, generator=torch.Generator().manual_seed(comm.rank))).sum().backward()
                total += model.module.weight.grad
            found.append(total / (1 if policy is None else 40))
        return float((found[1] - found[0]).norm() / found[0].norm())

    assert all(error < 0.2 for error in run_ranks(body, 2))


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
