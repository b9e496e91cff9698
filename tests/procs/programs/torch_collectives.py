"""Every collective of torch.distributed on the backend "ringred", in its synchronous and asynchronous forms."""

import itertools
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from tests import fake_tensors

CHECKS = itertools.count()


def check(got, wanted):
    wanted = torch.as_tensor(wanted, dtype=got.dtype).expand(got.shape)
    assert torch.equal(got, wanted), f"check {next(CHECKS)}: expected {wanted}, got {got}"
    next(CHECKS)


def finished(work, async_op):
    if async_op:
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()
        assert work.exception() is None
    else:
        assert work is None


def all_forms(rank, size, group, async_op):
    total = size * (size + 1) // 2
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.uint8,
        torch.complex64,
    ):
        tensor = torch.full((5, 3), rank + 1, dtype=dtype)
        finished(dist.all_reduce(tensor, group=group, async_op=async_op), async_op)
        check(tensor, total)
    for op, wanted in ((dist.ReduceOp.MAX, size), (dist.ReduceOp.MIN, 1), (dist.ReduceOp.AVG, (size + 1) / 2)):
        tensor = torch.full((1000,), rank + 1.0)
        finished(dist.all_reduce(tensor, op, group=group, async_op=async_op), async_op)
        check(tensor, wanted)
    bits = torch.tensor([1 << rank])
    finished(dist.all_reduce(bits, dist.ReduceOp.BOR, group=group, async_op=async_op), async_op)
    check(bits, [(1 << size) - 1])
    tensor = torch.ones(7)
    finished(dist.all_reduce(tensor, dist._make_nccl_premul_sum(0.5), group=group, async_op=async_op), async_op)
    check(tensor, size / 2)
    odd = torch.arange(12.0).reshape(3, 4).t()
    finished(dist.all_reduce(odd, group=group, async_op=async_op), async_op)
    check(odd, torch.arange(12.0).reshape(3, 4).t() * size)

    for root in range(size):
        tensor = torch.full((9,), float(rank))
        finished(dist.broadcast(tensor, group=group, group_src=root, async_op=async_op), async_op)
        check(tensor, root)
        tensor = torch.full((9,), rank + 1.0)
        finished(dist.reduce(tensor, group=group, group_dst=root, async_op=async_op), async_op)
        check(tensor, total if rank == root else rank + 1.0)
        shares = [torch.empty(2, 2) for _ in range(size)] if rank == root else None
        mine = torch.full((2, 2), float(rank))
        finished(dist.gather(mine, shares, group=group, group_dst=root, async_op=async_op), async_op)
        for peer, share in enumerate(shares or []):
            check(share, peer)
        shares = [torch.full((2, 2), 10.0 * peer) for peer in range(size)] if rank == root else None
        finished(dist.scatter(mine, shares, group=group, group_src=root, async_op=async_op), async_op)
        check(mine, 10.0 * rank)

    mine = torch.full((2, 3), float(rank))
    shares = [torch.empty(2, 3) for _ in range(size)]
    finished(dist.all_gather(shares, mine, group=group, async_op=async_op), async_op)
    for peer, share in enumerate(shares):
        check(share, peer)
    uneven = [torch.empty(peer + 1) for peer in range(size)]
    finished(dist.all_gather(uneven, torch.full((rank + 1,), float(rank)), group=group, async_op=async_op), async_op)
    for peer, share in enumerate(uneven):
        check(share, peer)
    whole = torch.empty(2 * size, 3)
    finished(dist.all_gather_into_tensor(whole, mine, group=group, async_op=async_op), async_op)
    check(whole, torch.arange(float(size)).repeat_interleave(2)[:, None].expand(-1, 3))

    output = torch.empty(4)
    given = [torch.full((4,), float(rank + peer)) for peer in range(size)]
    finished(dist.reduce_scatter(output, given, group=group, async_op=async_op), async_op)
    check(output, total - size + size * rank)
    finished(dist.reduce_scatter_tensor(output, torch.cat(given), group=group, async_op=async_op), async_op)
    check(output, total - size + size * rank)

    incoming = [torch.empty(peer + 1) for peer in range(size)]
    outgoing = [torch.full((rank + 1,), float(10 * rank + peer)) for peer in range(size)]
    finished(dist.all_to_all(incoming, outgoing, group=group, async_op=async_op), async_op)
    for peer, share in enumerate(incoming):
        check(share, 10 * peer + rank)
    rows = torch.empty(sum(peer + 1 for peer in range(size)), 2)
    given = torch.arange(float(size)).repeat_interleave(rank + 1)[:, None].expand(-1, 2).contiguous()
    splits = [peer + 1 for peer in range(size)], [rank + 1] * size
    finished(dist.all_to_all_single(rows, given, *splits, group=group, async_op=async_op), async_op)
    check(rows, rank)
    equal = torch.empty(size)
    finished(dist.all_to_all_single(equal, torch.full((size,), float(rank)), group=group, async_op=async_op), async_op)
    check(equal, torch.arange(float(size)))
    finished(dist.barrier(group=group, async_op=async_op), async_op)


def several_as_one(rank, size):
    tensors = [torch.full((n,), rank + 1.0) for n in (1, 10, 1000)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor)
    manager.wait()
    for tensor in tensors:
        check(tensor, size * (size + 1) / 2)


def messages(rank, size):
    after, before = (rank + 1) % size, (rank - 1) % size
    # Receives of two tags, posted the other way round than they are sent, with a collective in between.
    first, second = torch.empty(3), torch.empty(3)
    receives = [dist.irecv(second, before, tag=2), dist.irecv(first, before, tag=1)]
    dist.barrier()
    sends = [dist.isend(torch.full((3,), 1.0), after, tag=1), dist.isend(torch.full((3,), 2.0), after, tag=2)]
    for work in [*receives, *sends]:
        work.wait()
    check(first, 1.0)
    check(second, 2.0)
    if rank:
        dist.send(torch.tensor([float(rank)]), 0, tag=7)
    else:
        found = set()
        for _ in range(size - 1):
            came = torch.empty(1)
            source = dist.recv(came, tag=7)
            check(came, source)
            found.add(source)
        assert found == set(range(1, size))
    batch = [
        dist.P2POp(dist.isend, torch.full((4,), float(rank)), after),
        dist.P2POp(dist.irecv, came := torch.empty(4), before),
    ]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    check(came, before)


def objects(rank, size):
    found = [None] * size
    dist.all_gather_object(found, {"rank": rank, "list": list(range(rank))})
    assert [entry["rank"] for entry in found] == list(range(size))
    told = ["from 0"] if rank == 0 else [None]
    dist.broadcast_object_list(told)
    assert told == ["from 0"]


def groups(rank, size):
    pairs = [dist.new_group([low, low + 1]) for low in range(size - 1)]
    for low, pair in enumerate(pairs):
        if rank in (low, low + 1):
            tensor = torch.ones(5)
            dist.all_reduce(tensor, group=pair)
            check(tensor, 2)
    backwards = dist.new_group(list(reversed(range(size))))
    tensor = torch.full((3,), float(rank))
    dist.broadcast(tensor, 0, group=backwards)
    check(tensor, 0)
    part = dist.group.WORLD.split_group([0, 1], group_name="part")
    assert (part is None) == (rank > 1)
    if part is not None:
        tensor = torch.ones(5)
        part.allreduce([tensor]).wait()
        check(tensor, 2)
        part.shutdown()
    dist.destroy_process_group(backwards)


def sparse(rank, size):
    tensor = torch.sparse_coo_tensor([[rank, size]], [1.0, 1.0], (size + 1,), check_invariants=True)
    dist.all_reduce(tensor)
    check(tensor.to_dense(), [1.0] * size + [float(size)])


def futures(rank, size):
    from ringred.torch_backend.group import monitored_barrier

    tensor = torch.full((3,), rank + 1.0)
    future = dist.all_reduce(tensor, async_op=True).get_future().then(lambda done: done.value()[0] * 2)
    check(future.wait(), size * (size + 1))

    def again(done):  # a callback that waits for a collective, as PowerSGD's does
        return dist.all_reduce(done.value()[0], async_op=True).get_future().wait()[0]

    check(dist.all_reduce(torch.ones(2), async_op=True).get_future().then(again).wait(), size * size)
    monitored_barrier(timeout=timedelta(seconds=20))


def main():
    warnings.simplefilter("ignore")
    on_device = sys.argv[1:] == ["fake"]
    if on_device:
        fake_tensors.install()
        torch.set_default_device("fake")
        assert torch.ones(1).device.type == "fake"
    dist.init_process_group("ringred")
    rank, size = dist.get_rank(), dist.get_world_size()
    assert dist.get_backend() == "ringred"
    whole = dist.new_group()
    for group in (None, whole):
        for async_op in (False, True):
            all_forms(rank, size, group, async_op)
    for part in (several_as_one, messages, objects, groups, sparse, futures):
        if part is not sparse or not on_device:  # the fake has no sparse tensors
            part(rank, size)
    dist.barrier()
    dist.destroy_process_group()
    print("every check passed\n", end="", flush=True)


if __name__ == "__main__":
    main()
