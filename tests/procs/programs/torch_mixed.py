"""ringred for CPU tensors beside another backend for other devices: from torch 2.14 on, and refused by name before."""

import torch
import torch.distributed as dist

import ringred
from ringred.torch_backend.versions import Backend


def main():
    refused = None
    try:
        dist.init_process_group("cpu:ringred,cuda:gloo")
    except ringred.TransportUnavailable as refusal:
        refused = str(refusal)
    assert (refused is not None) == (Backend is None)
    if refused is not None:
        assert "needs torch 2.14 or newer" in refused
        dist.init_process_group("ringred")  # the process lives on
    tensor = torch.ones(5)
    dist.all_reduce(tensor)
    dist.all_reduce(tensor, async_op=True).wait()
    dist.all_reduce(tensor, group=dist.new_group())
    assert tensor.tolist() == [8.0] * 5
    gathered = torch.empty(2)
    dist.all_gather_into_tensor(gathered, torch.full((1,), float(dist.get_rank())))
    assert gathered.tolist() == [0.0, 1.0]
    dist.destroy_process_group()
    print("as this version of torch lets us\n", end="", flush=True)


if __name__ == "__main__":
    main()
