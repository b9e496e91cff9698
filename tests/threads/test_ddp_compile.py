"""DDP of what torch.compile made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ringred


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
