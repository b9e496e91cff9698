"""DistributedDataParallel on a model of the device type "fake": the same bits as on the CPU, in every way of reducing.

Each way trains the same small model twice from the same data, and rank 0 prints what differs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as _distributed
from torch import Tensor, nn
from torch.utils import _pytree

import ringred
from tests.fake_tensors import install

install()
dist: Any = _distributed  # torch declares no types for most of what is used here

_HOOKS: dict[str, Callable[[ringred.Communicator], Any]] = {
    "half": ringred.hooks.Half,
    "int8": ringred.hooks.Int8,
    "top k": ringred.hooks.TopK,
    "power sgd": ringred.hooks.PowerSGD,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "finite": {"check_finite": True},
    "many buckets": {"deterministic": True, "bucket_cap_mb": 0.001},
    "batched": {"batched_grad_copy": True, "desync_check_every": 1},
    "inputs moved": {"device_ids": [0]},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.first = nn.Embedding(50, 8), nn.Linear(8, 32)
        self.norm, self.last = nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.norm(self.first(self.embedding(x))).relu())


def trained(comm: ringred.Communicator, way: str, device: str) -> list[Tensor]:
    """Parameters, buffers and optimizer state after four steps."""
    module: nn.Module = Model().to(device)
    if way == "synchronised norm":
        module = ringred.SyncBatchNorm.convert_sync_batchnorm(module, comm)
    settings = dict(_SETTINGS.get(way, {}))
    if device == "cpu":
        settings.pop("device_ids", None)
    model = ringred.DistributedDataParallel(module, process_group=comm, **settings)
    if way in _HOOKS:
        policy = _HOOKS[way](comm)
        model.register_comm_hook(policy, ringred.hooks.comm_hook)
    optimizer: torch.optim.Optimizer
    if way == "sharded":
        optimizer = ringred.optim.ShardedOptimizer(model, torch.optim.Adam, lr=1e-2)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(comm.rank)
    for step in range(4):
        inputs = torch.randint(0, 50, (6,), generator=draw)
        if "device_ids" not in settings:
            inputs = inputs.to(device)
        if way == "weighed":
            model.weigh(comm.rank + 1)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if way == "top k" and step == 1:
            policy.load_state_dict(_pytree.tree_map_only(Tensor, Tensor.cpu, policy.state_dict()))
        if way == "sharded" and step == 1:
            assert isinstance(optimizer, ringred.optim.ShardedOptimizer)
            whole = [_pytree.tree_map_only(Tensor, Tensor.cpu, optimizer.full_state_dict(0))]
            dist.broadcast_object_list(whole)
            optimizer.load_full_state_dict(whole[0] or {})
    model.check_desync()
    report = model.overlap_report()
    assert all(bucket.start_ms <= bucket.end_ms for bucket in report.buckets), report
    model.straggler_report()
    return [tensor.detach().cpu() for tensor in (*module.parameters(), *module.buffers())]


def main() -> None:
    dist.init_process_group("ringred")
    comm = ringred.init()
    checked = 0
    for way in (*_SETTINGS, *_HOOKS, "synchronised norm", "sharded", "weighed"):
        host, device = (trained(comm, way, where) for where in ("cpu", "fake"))
        if not all(map(torch.equal, host, device)):
            sys.exit(f"rank {comm.rank}: {way}: other bits than on the CPU")
        checked += 1
    if not all(map(torch.equal, by_torch("cpu"), by_torch("fake"))):
        sys.exit(f"rank {comm.rank}: torch's own: other bits than on the CPU")
    with_join(comm)
    refused(comm)
    if comm.rank == 0:
        print(f"{checked} ways, the same bits")
    dist.destroy_process_group()


def by_torch(device: str) -> list[Tensor]:
    """torch's own DistributedDataParallel, on backend="ringred"."""
    module = Model().to(device)
    model = nn.parallel.DistributedDataParallel(module)
    draw = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        model(torch.randint(0, 50, (6,), generator=draw).to(device)).square().mean().backward()
    return [parameter.grad.cpu() for parameter in module.parameters() if parameter.grad is not None]


def refused(comm: ringred.Communicator) -> None:
    """Devices that do not fit the parameters, and tensors of two devices in one call."""
    model = nn.Linear(2, 2).to("fake")
    torn = nn.Sequential(nn.Linear(2, 2).to("fake"), nn.Linear(2, 2))
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (model, {"device_ids": [1]}, "got device_ids [1]"),
        (model, {"device_ids": [0], "output_device": 1}, "output_device 1"),
        (model, {"output_device": 1}, "output_device 1"),
        (torn, {}, "'1.weight': expected it on fake:0, as those before, got cpu"),
    ]
    for module, settings, text in cases:
        with pytest.raises((ValueError, ringred.RingredError), match=re.escape(text)):
            ringred.DistributedDataParallel(module, process_group=comm, **settings)
    ringred.DistributedDataParallel(model, [torch.device("fake")], process_group=comm)
    with pytest.raises(ringred.UnsupportedTensor, match="expected tensors on one device, got them on cpu, fake:0"):
        comm.all_gather(torch.empty(2 * comm.size), torch.ones(2, device="fake"))


def with_join(comm: ringred.Communicator) -> None:
    """Ranks with unlike numbers of batches."""
    model = ringred.DistributedDataParallel(nn.Linear(4, 2).to("fake"), process_group=comm)
    with model.join():
        for _ in range(comm.rank + 1):
            model(torch.ones(3, 4, device="fake")).sum().backward()
    model.check_desync()


if __name__ == "__main__":
    main()
