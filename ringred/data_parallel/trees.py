"""State as plain data: dictionaries, lists, numbers, texts and tensors, as JSON and raw memory. Nothing is pickled."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringred.communicator import Communicator
from ringred.errors import UnsupportedTensor
from ringred.runtime.tensors import carried

__all__ = ["broadcast_tree", "dtype_name", "named_dtype", "planted", "uprooted"]

_TENSOR, _MAPPING, _TUPLE, _REAL, _ARRAY = "tensor", "mapping", "tuple", "real", "array"


def uprooted(tree: Any) -> tuple[str, list[Tensor]]:
    """A tree as a text, and the tensors in it, in order. Raises `TypeError` where it holds anything else than tensors,
    numpy arrays, dictionaries, lists, tuples, texts, numbers, booleans and None."""
    tensors: list[Tensor] = []
    return json.dumps(_plain(tree, tensors, "")), tensors


def _plain(tree: Any, tensors: list[Tensor], path: str) -> Any:
    if isinstance(tree, Tensor):
        if tree.layout != torch.strided:
            raise UnsupportedTensor(f"state{path}: expected a dense tensor, got {tree.layout}")
        tensors.append(tree.detach())
        return {_TENSOR: [dtype_name(tree.dtype), *tree.shape]}
    if isinstance(tree, np.ndarray):
        tensors.append(torch.from_numpy(np.ascontiguousarray(tree).view(np.uint8).reshape(-1)))
        return {_ARRAY: [str(tree.dtype), *tree.shape], "bytes": tree.nbytes}
    if isinstance(tree, dict):
        return {_MAPPING: [[_plain(k, tensors, path), _plain(v, tensors, f"{path}[{k!r}]")] for k, v in tree.items()]}
    if isinstance(tree, tuple):
        return {_TUPLE: [_plain(item, tensors, f"{path}[{at}]") for at, item in enumerate(tree)]}
    if isinstance(tree, list):
        return [_plain(item, tensors, f"{path}[{at}]") for at, item in enumerate(tree)]
    if isinstance(tree, float) and not math.isfinite(tree):
        return {_REAL: repr(tree)}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, np.generic):
        return tree.item()
    raise TypeError(f"state{path}: expected tensors, dictionaries, lists, numbers or texts, got {type(tree).__name__}")


def planted(text: str, tensors: Sequence[Tensor]) -> Any:
    """The tree that `uprooted` made a text of."""
    rest = iter(tensors)
    return _tree(json.loads(text), rest)


def _tree(plain: Any, rest: Any) -> Any:
    if isinstance(plain, list):
        return [_tree(item, rest) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        return next(rest)
    if _ARRAY in plain:
        kind, *shape = plain[_ARRAY]
        return next(rest).numpy().view(np.dtype(kind)).reshape(shape).copy()
    if _REAL in plain:
        return float(plain[_REAL])
    if _TUPLE in plain:
        return tuple(_tree(item, rest) for item in plain[_TUPLE])
    return {_tree(key, rest): _tree(value, rest) for key, value in plain[_MAPPING]}


def shapes_of(text: str) -> list[tuple[torch.dtype, list[int]]]:
    """The dtype and shape of each tensor in a tree, in order."""
    found: list[tuple[torch.dtype, list[int]]] = []

    def walk(plain: Any) -> None:
        if isinstance(plain, list):
            for item in plain:
                walk(item)
        elif isinstance(plain, dict):
            if _TENSOR in plain:
                kind, *shape = plain[_TENSOR]
                found.append((named_dtype(kind), shape))
            elif _ARRAY in plain:
                found.append((torch.uint8, [plain["bytes"]]))
            else:
                walk(plain.get(_TUPLE) or plain.get(_MAPPING) or [])

    walk(json.loads(text))
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """Raises `ValueError` unless it is the name of a dtype."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"expected a dtype, got {name!r}")
    return found


def broadcast_tree(comm: Communicator, tree: Any, src: int = 0) -> Any:
    """The tree of rank `src`; its own on that rank. Collective."""
    mine = comm.rank == src
    text, tensors = uprooted(tree) if mine else ("", [])
    encoded = text.encode()
    length = torch.tensor([len(encoded)], dtype=torch.int64)
    comm.broadcast(length, src)
    words = torch.frombuffer(bytearray(encoded), dtype=torch.uint8) if mine else torch.empty(0, dtype=torch.uint8)
    words = words if mine else torch.empty(int(length), dtype=torch.uint8)
    comm.broadcast(words, src)
    if not mine:
        text = bytes(words.tolist()).decode()
        tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in shapes_of(text)]
    for tensor in tensors:
        if tensor.numel():
            comm.broadcast(carried(tensor.cpu().contiguous() if mine else tensor).view(-1), src)
    return tree if mine else planted(text, tensors)
