"""A device type "fake" for torch, on which modules train: its tensors lie in host memory, and torch refuses to mix them
with the CPU's as it does with a GPU's. ringred takes them by the fake driver (`ringred.testing.fake_device`).

torch calls `_on_the_host` for every operator: it runs the CPU's kernel on the same memory. By torch's private interface
for backends in Python, which 2.13 has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.utils import _pytree

from ringred.testing.fake_device import FakeDevice
from ringred.transports.cuda import joining

__all__ = ["available", "host", "install"]

_aten = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_MAY_MIX = ("copy_", "_copy_from", "_copy_from_and_resize", "set_")
_installed: list[Any] = []


def available() -> bool:
    """Whether this torch has what it takes."""
    return hasattr(torch._C, "_acc") and hasattr(torch._C._acc, "create_empty_tensor")


def install() -> None:
    """Makes "fake" a device of torch's and of ringred's. Once in a process, for ever."""
    if _installed:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("fake")
    library = torch.library.Library("_", "IMPL")
    library.fallback(_on_the_host, "PrivateUse1")
    _installed.append(library)
    backends: Any = distributed.Backend.backend_capability
    backends["ringred"] = [*backends["ringred"], "fake"]
    joining.DRIVERS["fake"] = lambda device, cache: FakeTensorDevice()


class FakeTensorDevice(FakeDevice):
    """The fake driver, for tensors of the device type "fake"."""

    def tensor(self, address: int, nbytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        return _there(super().tensor(address, nbytes, dtype, owner))

    def seen_by_the_host(self, tensor: Tensor) -> Tensor:
        return host(tensor)


def host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same memory."""
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def _there(tensor: Tensor) -> Tensor:
    """A tensor of the device over the memory of a CPU tensor, which its storage keeps."""
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device("fake", 0), storage.nbytes()
    )
    memory.owner = tensor
    return _over(memory, tensor)


def _over(storage: Any, like: Tensor) -> Tensor:
    return _set(torch._C._acc.create_empty_tensor((0,), like.dtype), storage, like)


def _set(tensor: Tensor, storage: Any, like: Tensor) -> Tensor:
    place = like.storage_offset(), list(like.shape), list(like.stride())
    _aten.set_.source_Storage_storage_offset.redispatch(_CPU, tensor, storage, *place)
    return tensor


def _on_the_host(operator: Any, *arguments: Any, **options: Any) -> Any:
    name = operator._schema.name.removeprefix("aten::")
    if name in ("_copy_from", "_copy_from_and_resize"):
        source, target = (host(t) if t.device.type == "fake" else t for t in arguments[:2])
        target.copy_(source)
        return arguments[1]
    if name == "resize_":
        new = _there(torch.empty(arguments[1], dtype=arguments[0].dtype))
        return _set(arguments[0], new.untyped_storage(), new)
    given: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of a CPU tensor: it, and the device's
    storages: dict[int, Any] = {}

    def inward(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor):
            return value
        if value.device.type != "fake":
            if value.dim() and name not in _MAY_MIX:
                raise RuntimeError(f"{operator}: Expected all tensors to be on the same device, got fake:0 and cpu")
            return value
        storage = value.untyped_storage()
        mine = host(value) if storage.data_ptr() else torch.empty(value.shape, dtype=value.dtype)
        given[id(mine)] = mine, value
        if storage.data_ptr():
            storages[storage.data_ptr()] = storage
        return mine

    def outward(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in given:
            return given[id(value)][1]
        shared = storages.get(value.untyped_storage().data_ptr())
        return _there(value) if shared is None else _over(shared, value)

    positional, named = _pytree.tree_map(inward, (arguments, options))
    results = operator(*positional, **named)
    for mine, value in list(given.values()):
        if mine.numel() and not value.untyped_storage().data_ptr():  # an output that got its memory now
            new = _there(mine)
            _set(value, new.untyped_storage(), new)
    return _pytree.tree_map(outward, results)
