"""All that servers have, as one dictionary: put together from shards, and cut again for any number of them.

The dictionary holds numbers, texts and tensors, so `torch.save` writes it and `torch.load(weights_only=True)` reads it:

    {"version": updates made, "rate": factor, "policy": text, "rule": {...}, "figures": {...}, "rates": [...],
     "schedule": {...} or None, "tensors": {name: {"group": number, "value": Tensor, "optimizer": {name: Tensor}}}}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ringred.errors import PolicyError
from ringred.parameter_server.shard import Frame, Shard, as_tensor, dtype_of

__all__ = ["FIELDS", "Layout", "cut", "go_on_from", "joined", "of_coordinator"]

Layout = Mapping[str, Sequence[tuple[int, int, int, int]]]
"""The pieces of each tensor, in the order of their elements: number, start, stop, shard."""

FIELDS = ("version", "rate", "policy", "rule", "figures", "rates", "schedule", "tensors")


class _Kept:
    """What one shard keeps of one piece."""

    def __init__(self, value: Tensor, group: int, optimizer: dict[str, Any]) -> None:
        self.value, self.group, self.optimizer = value, group, optimizer


def joined(told: Mapping[str, Any], shards: Sequence[tuple[Any, Sequence[Frame]]]) -> dict[str, Any]:
    """The whole, of what the coordinator and each shard returned as their states."""
    pieces: dict[int, _Kept] = {}
    rates: list[float] = []
    schedule = None
    for state, frames in shards:
        given = list(frames)
        values = [as_tensor(given.pop(0), dtype_of(dtype)).view(shape) for _, shape, dtype, _ in state["pieces"]]
        kept = [as_tensor(given.pop(0), dtype_of(dtype)).view(shape) for shape, dtype in state["kept"]]
        entries = state["stepper"].get("kept") or [{} for _ in values]
        for (number, _, _, group), value, entry in zip(state["pieces"], values, entries, strict=True):
            optimizer = {name: kept[e["tensor"]] if "tensor" in e else e["number"] for name, e in entry.items()}
            pieces[number] = _Kept(value, group, optimizer)
        rates = rates or state["stepper"].get("rates", [])
        schedule = schedule or state["stepper"].get("schedule")
    tensors = {
        name: _whole([pieces[number] for number in numbers], shape) for name, shape, _, _, numbers in told["tensors"]
    }
    head = {name: told[name] for name in ("version", "rate", "policy", "rule", "figures")}
    return {**head, "rates": rates, "schedule": schedule, "tensors": tensors}


def _whole(parts: Sequence[_Kept], shape: Sequence[int]) -> dict[str, Any]:
    first = parts[0]
    if len(parts) == 1:
        return {"group": first.group, "value": first.value.clone(), "optimizer": _cloned(first.optimizer)}
    optimizer = {
        name: torch.cat([part.optimizer[name] for part in parts]).view(shape) if _follows(entry, first.value) else entry
        for name, entry in first.optimizer.items()
    }
    value = torch.cat([part.value for part in parts]).view(shape)
    return {"group": first.group, "value": value, "optimizer": _cloned(optimizer)}


def _follows(entry: Any, value: Tensor) -> bool:
    """Whether the optimizer keeps an element for each one of the value; its count of steps has no dimension."""
    return isinstance(entry, Tensor) and entry.dim() > 0 and entry.shape == value.shape


def _cloned(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: entry.clone() if isinstance(entry, Tensor) else entry for name, entry in entries.items()}


def cut(whole: Mapping[str, Any], layout: Layout, shard: int) -> tuple[dict[str, Any], list[Tensor]]:
    """The state of shard `shard` of those that `layout` places tensors on: `joined` of all of them is the whole again.

    Raises `PolicyError` for what is no whole state, and for tensors that are missing, unknown or of another size.
    """
    tensors = tensors_of(whole)
    if tensors.keys() != layout.keys():
        missing, unknown = sorted(layout.keys() - tensors.keys()), sorted(tensors.keys() - layout.keys())
        raise PolicyError(f"the state is of other tensors: missing {missing[:5]}, unknown {unknown[:5]}")
    pieces: list[list[Any]] = []
    values: list[Tensor] = []
    entries: list[dict[str, Any]] = []
    kept: list[Tensor] = []
    own = [(piece, name) for name, of_tensor in layout.items() for piece in of_tensor if piece[3] == shard]
    for (number, start, stop, _), name in sorted(own):
        entry = tensors[name]
        value = entry["value"]
        if layout[name][-1][2] != value.numel():
            raise PolicyError(f"{name!r}: expected {layout[name][-1][2]} elements, the state has {value.numel()}")
        all_of_it = stop - start == value.numel()
        part = value if all_of_it else value.reshape(-1)[start:stop]
        pieces.append([number, list(part.shape), _name(part.dtype), entry["group"]])
        values.append(part.contiguous())
        described: dict[str, Any] = {}
        for key, of_optimizer in entry["optimizer"].items():
            if not isinstance(of_optimizer, Tensor):
                described[key] = {"number": of_optimizer}
                continue
            follows = not all_of_it and _follows(of_optimizer, value)
            described[key] = {"tensor": len(kept)}
            kept.append((of_optimizer.reshape(-1)[start:stop] if follows else of_optimizer).contiguous())
        entries.append(described)
    told = {
        "version": whole["version"],
        "rule": whole["rule"],
        "pieces": pieces,
        "stepper": {"kept": entries, "rates": whole["rates"], "schedule": whole["schedule"]} if pieces else {},
        "kept": [[list(tensor.shape), _name(tensor.dtype)] for tensor in kept],
    }
    return told, [*values, *kept]


def of_coordinator(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The coordinator's part of a whole state, for JSON. Raises `PolicyError` for what is no whole state."""
    tensors = [
        [name, list(entry["value"].shape), _name(entry["value"].dtype), entry["group"]]
        for name, entry in tensors_of(whole).items()
    ]
    return {name: whole[name] for name in ("version", "rate", "policy", "rule", "figures")} | {"tensors": tensors}


def go_on_from(whole: Mapping[str, Any], machines: Iterable[Any], catalog: Any) -> None:
    """Coordinators and shards take a whole state, as `catalog`, which is new, places its tensors."""
    head = of_coordinator(whole)
    catalog.load_state(head)
    for machine in machines:
        if isinstance(machine, Shard):
            machine.load_state(*cut(whole, catalog.layout, machine.number))
        else:
            machine.load_state(head)


def tensors_of(whole: Any) -> dict[str, Any]:
    """The tensors of a whole state. Raises `PolicyError` for anything else."""
    missing = [name for name in FIELDS if not isinstance(whole, Mapping) or name not in whole]
    if missing:
        raise PolicyError(f"no state of a parameter server: {', '.join(missing)} missing in {type(whole).__name__}")
    tensors: dict[str, Any] = whole["tensors"]
    return tensors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
