"""ringred's DDP beside torch's on Gloo, on the same data: equal to the bit on two ranks."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ringred
from tests.threads.test_ddp import MODELS, built

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
comm = ringred.init()
assert comm.size == size
assert comm.rank == rank
compared = 0
for kind in MODELS:
    for dtype in (torch.float64, torch.float32):
        original = built(kind, seed=rank).to(dtype)
        models = [
            torch.nn.parallel.DistributedDataParallel(copy.deepcopy(original), bucket_cap_mb=1),
            ringred.DistributedDataParallel(copy.deepcopy(original), bucket_cap_mb=0.005),
        ]
        assert models[1].comm is comm
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
        generator = torch.Generator().manual_seed(100 + rank)
        for _ in range(10):
            images = torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
            labels = torch.randint(0, 5, (6,), generator=generator)
            losses = []
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            assert torch.equal(*losses), f"{kind} {dtype}: losses {losses}"
            for theirs, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
                assert torch.equal(theirs.grad, ours.grad), f"{kind} {dtype}: gradients differ"
                compared += 1
comm.close()
dist.destroy_process_group()
if rank == 0:
    print(f"equal to the bit: {compared} gradients", flush=True)
