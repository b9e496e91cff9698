"""At the end of a program, whatever it did, no thread of ringred is left that the interpreter would have to kill, and
none is started."""

import atexit
import threading

late = []


def tell():
    left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    print(f"threads left: {left + late}\n", end="", flush=True)


def note_starts():
    start = threading.Thread.start

    def noted(thread):
        late.append(f"{thread.name}, started at the end")
        start(thread)

    threading.Thread.start = noted


def main():
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import ringred
    from ringred.data_parallel.lane import Lane
    from ringred.hooks import all_reduce_hook

    dist.init_process_group("gloo")
    comm = ringred.init()
    model = DistributedDataParallel(nn.Linear(4, 4))
    model.register_comm_hook(comm, all_reduce_hook)
    model(torch.ones(2, 4)).sum().backward()
    comm.all_reduce(torch.ones(4), async_op=True).wait()
    work = {thread.name.rstrip("-0123456789") for thread in threading.enumerate()}
    assert work >= {"ringred-listener", "ringred-watch", "ringred-callbacks", "ringred-neighbours"}, work
    tell.unused = Lane(comm, "unused")  # alive to the end
    dist.destroy_process_group()
    atexit.register(note_starts)  # called first


atexit.register(tell)  # before anything of torch or ringred is imported: what is registered first is called last
main()
