"""DDP of what torch.compile made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator
from ringred.testing import run_ranks


def test_compiled_graphs_are_cut_where_buckets_end() -> None:
    """Else all gradients would come at the end of backward, and nothing would overlap."""

    class Layers(nn.Module):
        """The compiler leaves the frames of torch's own containers alone."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(600, 600) for _ in range(4)])  # of 1.4 MB each

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def graphs_of(compiles: Callable[[nn.Module, Any], nn.Module]) -> int:
        torch.compiler.reset()
        graphs = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        model = ringred.DistributedDataParallel(Layers(), bucket_cap_mb=1)
        runs = compiles(model, backend)
        for _ in range(2):
            runs(torch.ones(2, 600)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.comm.close()
        return len(graphs)

    def whole(model: nn.Module, backend: Any) -> nn.Module:
        return torch.compile(model, backend=backend)

    def within(model: nn.Module, backend: Any) -> nn.Module:
        model.module = torch.compile(model.module, backend=backend)
        return model

    assert graphs_of(whole) == 4
    assert graphs_of(within) == 4


def test_a_program_may_put_this_class_in_the_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo  # the compiler is there, so that forward tells it of the buckets

    for module in (torch.nn.parallel, torch.nn.parallel.distributed):
        monkeypatch.setattr(module, "DistributedDataParallel", ringred.DistributedDataParallel)

    def body(comm: Communicator) -> torch.Tensor:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2), process_group=comm)
        model(torch.full((1, 3), float(comm.rank))).sum().backward()
        return model.module.weight.grad

    assert all(torch.equal(gradient, torch.full((2, 3), 0.5)) for gradient in run_ranks(body, 2))
