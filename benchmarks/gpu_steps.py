"""The steps of gpu_check.py, on each rank: `python benchmarks/gpu_steps.py STEP`, started by it."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

SIZES = (4, 1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20, 25 << 20, 256 << 20, 2 << 30)
FAKE = os.environ.get("GPU_CHECK_FAKE") == "1"


def here() -> torch.device:
    """Where this rank's tensors are."""
    return torch.device("cpu") if FAKE else torch.device("cuda", torch.cuda.current_device())


def synchronize() -> None:
    if not FAKE:
        torch.cuda.synchronize()


def ranks_on_devices() -> Any:
    """The communicator for tensors of this rank's device."""
    import ringred
    from ringred.testing.fake_device import FakeDevice

    comm = ringred.init()
    if FAKE:
        return comm.on_device(lambda: FakeDevice(delay=(0.0002, comm.rank)), here())
    comm.empty(1, device=here())
    return comm._on(here())


def device() -> dict[str, Any]:
    """What the device can do, and what its driver here lacks."""
    from ringred.transports.cuda import cupy_driver

    reason = cupy_driver.unavailable()
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "name": properties.name,
        "memory_mib": properties.total_memory >> 20,
        "devices": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "capabilities": {} if reason else cupy_driver.capabilities(),
        "mps": Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")).exists(),
    }
    if reason:
        raise RuntimeError(f"CUDA IPC cannot be used: {reason}")
    found["copy_gb_per_s"] = {str(nbytes): copied(nbytes) for nbytes in SIZES if nbytes >= 1 << 20}
    return found


def copied(nbytes: int) -> float:
    """GB/s of one process that copies within the device."""
    source = torch.empty(nbytes // 4, device="cuda")
    target = torch.empty_like(source)
    return nbytes / timed(lambda: target.copy_(source), 5) / 1e9


def timed(call: Callable[[], object], calls: int) -> float:
    """The median seconds of a call, with the device's work."""
    times = []
    for _ in range(calls + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def driver() -> dict[str, Any]:
    """Two ranks try each promise of the driver that the fake device keeps in the tests."""
    there = ranks_on_devices()
    window = there.empty(1 << 20)
    plane = there.transport.queue
    stream = plane.stream
    # Memory of the peer, written by a kernel here and read by one there.
    window.fill_(there.rank + 1.0)
    there.all_reduce(window)
    held: dict[str, bool] = {"a sum over the peer's memory": bool(window.eq(3.0).all().item())}
    # A flag that nobody sets holds the stream, and the host that writes it lets it go on.
    (rank,) = plane._theirs
    flag, at = plane._theirs[rank] + plane._flag_place(0, plane._links[rank].own), plane._flag_at(rank, 0)
    memory = plane._links[rank].window.memory
    before = int.from_bytes(memory[at : at + 4], "little")
    stream.wait_flag(flag, before + 1000)
    event = stream.record()
    time.sleep(0.2)
    held["a flag that is not set holds the stream"] = not event.done()
    memory[at : at + 4] = (before + 1000).to_bytes(4, "little")
    deadline = time.monotonic() + 5
    while not event.done() and time.monotonic() < deadline:
        time.sleep(0.001)
    held["the host's write lets it go on"] = event.done()
    if not all(held.values()):
        raise AssertionError(f"did not hold: {[name for name, fine in held.items() if not fine]}")
    report(held)
    time.sleep(1.0)  # the peer looks at this rank's flags
    os._exit(0)  # a flag was changed by hand: no collective after this


def collectives() -> dict[str, Any]:
    """Every all-reduce algorithm x dtype x operation, and the other collectives, against torch's results."""
    from ringred.collectives.registry import algorithms
    from ringred.runtime.folds import SUPPORTED, Folder, ReduceOp

    comm = ranks_on_devices()
    size = comm.size
    names = [name for name, entry in algorithms("all_reduce").items() if not entry.native and name != "hierarchical"]
    checked = 0
    for dtype, operations in SUPPORTED.items():
        for op in sorted(operations):  # in one order on all ranks
            for count in (1, 1000, 300_001):
                parts = [values(count, dtype, rank) for rank in range(size)]
                expected = torch.empty_like(parts[0])
                folder = Folder(op, dtype, size)
                if folder.scales_first:
                    parts_scaled = [part / size for part in parts]
                    folder(expected, parts_scaled, True)
                else:
                    folder(expected, parts, True)
                for name in names if dtype in (torch.float32, torch.bfloat16, torch.int32) else ["direct", "ring"]:
                    window = comm.empty(count, dtype).copy_(parts[comm.rank])
                    for tensor in (parts[comm.rank].to(here(), copy=True), window):
                        comm.all_reduce(tensor, op, algorithm=name)
                        close(f"{name} {op.value} {dtype} {count}", tensor.cpu(), expected, op is ReduceOp.PROD)
                        checked += 1
    for count in (7, 100_000):
        mine = torch.arange(count, device=here()) + 1000 * comm.rank
        whole = torch.empty(size * count, dtype=mine.dtype, device=here())
        comm.all_gather(whole, mine)
        every = torch.cat([torch.arange(count) + 1000 * rank for rank in range(size)])
        close("all_gather", whole.cpu(), every)
        share = torch.empty_like(mine)
        comm.reduce_scatter(share, whole)
        close("reduce_scatter", share.cpu(), size * mine.cpu())
        comm.broadcast(mine, size - 1)
        close("broadcast", mine.cpu(), torch.arange(count) + 1000 * (size - 1))
        outputs = torch.empty_like(whole)
        comm.all_to_all(outputs, whole)
        close("all_to_all", outputs.cpu(), every[comm.rank * count : (comm.rank + 1) * count].repeat(size))
        checked += 4
    small = torch.full((1000,), 1e-40, device=here())
    comm.all_reduce(small)
    if not torch.equal(small.cpu(), torch.full((1000,), 1e-40) * size):
        raise AssertionError(f"small numbers: expected {1e-40 * size:g}, got {small[0].item():g}")
    other = comm.duplicate()
    for elements in (1, 1 << 20):
        tensor = other.empty(elements).fill_(1.0)
        other.all_reduce(tensor, async_op=True).wait()
        close("a duplicate", tensor.cpu(), torch.full((elements,), float(size)))
        checked += 1
    other.close()
    for turn in range(50):  # the program's own stream still writes what is reduced
        with nullcontext() if FAKE else torch.cuda.stream(torch.cuda.Stream()):
            late = torch.full((1 << 20,), float(turn), device=here())
            for _ in range(5):
                late = late * 1.0
            work = comm.all_reduce(late, async_op=True)
            work.wait()
            close("a late writer", late[-1:].cpu(), torch.tensor([float(turn * size)]))
        checked += 1
    comm.barrier()
    return {"checked": checked}


def values(count: int, dtype: torch.dtype, rank: int) -> torch.Tensor:
    found = (torch.arange(count) * 7 + rank * 3) % 5
    return found.bool() if dtype == torch.bool else found.to(dtype)


def close(what: str, got: torch.Tensor, expected: torch.Tensor, loosely: bool = False) -> None:
    exact = not (got.dtype.is_floating_point or got.dtype.is_complex or loosely)
    torch.testing.assert_close(
        got, expected, **({"rtol": 0, "atol": 0} if exact else {}), msg=lambda text: f"{what}: {text}"
    )


def killed() -> dict[str, Any]:
    """The last rank is killed while the others reduce: they must raise, and their streams must be free."""

    import ringred

    comm = ranks_on_devices()
    tensor = torch.ones(1 << 20, device=here())
    comm.all_reduce(tensor)
    comm.barrier()
    began = time.monotonic()
    try:
        for turn in range(100_000):
            if comm.rank == comm.size - 1 and turn == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            comm.all_reduce(tensor.fill_(1.0))
            comm.synchronize()  # a call returns when all is enqueued
            assert tensor.eq(comm.size).all(), f"a wrong sum in turn {turn}"
            began = time.monotonic()
    except ringred.RingredError as error:
        took = time.monotonic() - began
        said = str(error)
    else:
        raise AssertionError("nobody noticed")
    synchronize()
    assert torch.ones(10, device=here()).sum().item() == 10, "the device works on"
    assert f"rank {comm.size - 1}" in said, said
    assert took < 1.5, took
    report({"raised_after_s": took, "error": said})
    os._exit(0)


def figures() -> dict[str, Any]:
    """Microseconds of an all-reduce, in windows and in torch's own memory."""
    return all_reduced(ranks_on_devices())


def all_reduced(comm: Any) -> dict[str, Any]:
    """Microseconds by bytes and memory, for tensors on the device of `comm`."""
    free = 1 << 30 if FAKE else torch.cuda.mem_get_info()[0]
    found: dict[str, Any] = {}
    for nbytes in SIZES:
        if nbytes * 3 * comm.size > free:
            continue
        for memory in ("window", "tensor"):
            shape = max(1, nbytes // 4)
            tensor = comm.empty(shape) if memory == "window" else torch.empty(shape, device=here())
            times = []
            for _ in range(11 if nbytes <= 25 << 20 else 4):
                tensor.fill_(1.0)
                synchronize()
                comm.barrier()
                began = time.perf_counter()
                comm.all_reduce(tensor)
                synchronize()
                times.append(time.perf_counter() - began)
            found.setdefault(str(nbytes), {})[memory] = statistics.median(times[1:]) * 1e6
            del tensor
    return found


def gloo() -> dict[str, Any]:
    """The same by torch on Gloo with CUDA tensors."""
    return by_torch("gloo", 25 << 20)


def nccl() -> dict[str, Any]:
    """The same by NCCL, which wants a device for each rank."""
    ranks, devices = int(os.environ["WORLD_SIZE"]), torch.cuda.device_count()
    if devices < ranks:
        return {"not_run": f"NCCL wants a GPU for each of {ranks} ranks, and sees {devices}"}
    return by_torch("nccl", 256 << 20)


def by_torch(backend: str, most: int) -> dict[str, Any]:
    """Microseconds of torch's all-reduce of up to `most` bytes."""
    import torch.distributed as dist

    dist.init_process_group(backend)
    found = {}
    for nbytes in (size for size in SIZES if size <= most):
        tensor = torch.empty(nbytes // 4, device="cuda")
        times = []
        for _ in range(6):
            tensor.fill_(1.0)
            torch.cuda.synchronize()
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        found[str(nbytes)] = statistics.median(times[1:]) * 1e6
    return found


def tuned() -> dict[str, Any]:
    """What a program meets that leaves all to ringred: seconds of its first collective, in which costs are measured,
    and microseconds of all-reduces by what was chosen then."""
    import ringred

    comm = ringred.init()
    if FAKE:
        return {"not_run": "the first collective of a device measures it, and this is none"}
    began = time.perf_counter()
    comm.all_reduce(torch.ones(1, device=here()))
    synchronize()
    found: dict[str, Any] = {"first_s": time.perf_counter() - began, "us": all_reduced(comm._on(here()))}
    found["costs"] = str(comm._on(here()).tuning)
    return found


def report(found: dict[str, Any]) -> None:
    """Writes what this rank found, for the process that started it."""
    path = Path(os.environ["GPU_CHECK_OUT"])
    if os.environ.get("RANK", "0") == "0":
        path.write_text(json.dumps(found))


def step_main(step: str, functions: dict[str, Any]) -> None:
    """Runs the one of these functions that `step` names."""
    if not FAKE:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    report(functions[step.partition("-")[0]]())


if __name__ == "__main__":
    step_main(sys.argv[1], globals())
