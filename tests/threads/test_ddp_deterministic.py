"""One order of addition: bits that depend on neither buckets nor algorithm nor transport."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ringred.communicator import Communicator
from ringred.errors import UnknownAlgorithm
from ringred.testing import run_ranks
from tests.threads.wrapping import MODEL, backward, gradients, wrapped

CAPS = (1e-6, 0.004, 25)


def test_the_caps_make_other_buckets() -> None:
    plans = run_ranks(lambda comm: [len(wrapped(comm, bucket_cap_mb=cap).bucket_plan()) for cap in CAPS], 1)
    assert plans == [[6, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_deterministic_bits_depend_on_neither_buckets_nor_algorithm_nor_transport(
    size: int, dtype: torch.dtype
) -> None:
    module = copy.deepcopy(MODEL).to(dtype)

    def body(comm: Communicator) -> list[list[Tensor]]:
        found = []
        for options in (
            *({"bucket_cap_mb": cap} for cap in CAPS),
            *({"algorithm": algorithm, "bucket_cap_mb": 0.004} for algorithm in ("direct", "one_shot", "central")),
            {"gradient_as_bucket_view": True},
        ):
            model = wrapped(comm, module, deterministic=True, **options)
            for step in range(2):
                model.zero_grad()
                generator = torch.Generator().manual_seed(100 * comm.rank + step)
                model(torch.randn(16, 30, generator=generator, dtype=dtype)).float().logsumexp(1).sum().backward()
            found.append(gradients(model))
        return found

    runs = [run_ranks(body, size, transport) for transport in ("local", "shm", "cuda_ipc:fake", "torch_p2p")]
    first = runs[0][0][0]
    assert any(g.any() for g in first)
    for run in runs:
        for rank in run:
            for got in rank:
                assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


def test_the_ring_adds_in_another_order_and_is_refused() -> None:
    """The test above could not fail if rounding did not show at all."""

    def body(comm: Communicator) -> bool:
        with pytest.raises(
            UnknownAlgorithm, match="adds an element in an order that depends on where the element lies"
        ):
            wrapped(comm, deterministic=True, algorithm="ring")
        found = []
        for cap in (CAPS[0], CAPS[2]):
            model = wrapped(comm, algorithm="ring", bucket_cap_mb=cap)
            backward(model, comm.rank)
            found.append(gradients(model))
        return all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    assert not any(run_ranks(body, 5))
