"""Processes on a device that is none: the table, memory of all sizes in turn, and training to the bit."""

import torch

import ringred
from ringred.testing.fake_device import FakeDevice
from tests.table import check_all_reduce, check_others


def trained(comm):
    """The parameters after 5 steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(50, 200), torch.nn.ReLU(), torch.nn.Linear(200, 10))
    ddp = ringred.DistributedDataParallel(model, process_group=comm, bucket_cap_mb=0.02, deterministic=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(comm.rank)
    for _ in range(5):
        optimizer.zero_grad()
        ddp(torch.randn(8, 50, generator=generator)).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


comm = ringred.init()
there = comm.on_device(lambda: FakeDevice(delay=(0.0003, comm.rank)), torch.device("cpu"))
assert there.transport.name == "cuda_ipc"
reduced = check_all_reduce(there, ["direct", "ring", "tree"]), check_others(there)
for megabytes in (1, 40, 3, 70, 2):  # more than a chunk, and less
    tensor = there.empty(megabytes << 18)
    tensor.fill_(comm.rank + 1)
    there.all_reduce(tensor)
    assert tensor.eq(6).all()
    del tensor
assert torch.equal(trained(there), trained(comm))
comm.barrier()
print(f"all right: {sum(reduced)} collectives")
