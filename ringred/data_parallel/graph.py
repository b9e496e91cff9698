"""Inspects autograd's graph: finds the tensors in a model's outputs, and the leaves that they depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["leaves_behind", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested outputs: sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def leaves_behind(outputs: Sequence[Tensor]) -> set[int]:
    """The ids of the leaves that the graph of `outputs` leads to."""
    leaves = {id(tensor) for tensor in outputs if tensor.grad_fn is None}
    nodes = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    visited = set(nodes)
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                nodes.append(following)
    return leaves
