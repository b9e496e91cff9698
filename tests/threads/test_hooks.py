"""Communication hooks: what they make of gradients, what they send, and that what they leave out comes later."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred import hooks
from ringred.communicator import Communicator
from ringred.data_parallel.compression import dequantised, largest, quantised
from ringred.testing import run_ranks
from tests.threads.hook_models import NEAR, POLICIES, batch, bytes_of, gradients_by, small


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
