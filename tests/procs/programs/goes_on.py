"""A training that goes on after failures: argv has the number of epochs, and then any of: faults of the first processes
(`ringred.testing.faults`); "whole", for more epochs until all ranks are there, since a process takes its time to start;
"raise", for an error that all ranks make; "early", for one of rank 1 before it meets the others.

Prints, as JSON, what each rank ends with.
"""

import hashlib
import json
import os
import sys
import time

import torch
from torch import nn

import ringred
from ringred.testing import faults


def say(what):
    os.write(1, (json.dumps(what) + "\n").encode())  # at once: lines of ranks do not mix


epochs, what = int(sys.argv[1]), sys.argv[2:]
most = epochs + 300 if "whole" in what else epochs
first = os.environ.get("RINGRED_JOINS", "0") == "0"
if "early" in what and os.environ["RANK"] == "1":
    say({"raises": time.time()})
    raise ValueError("no data here")
comm = ringred.init()
if first:
    faults.inject(comm, *(text for text in what if " " in text))
generator = torch.Generator().manual_seed(3)
inputs = torch.randn(2000, 10, generator=generator)
data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
model = ringred.DistributedDataParallel(net, on_failure="shrink")
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
sampler = ringred.ElasticSampler(data, 20, model)
state = ringred.Elastic(model, optimizer, sampler, seen=0)
loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)
say({"process": os.getpid(), "rank": comm.rank, "joins": not first})
for epoch in state.epochs(most):
    for x, y in loader:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        if "raise" in what and model.steps == 5:
            say({"raises": time.time()})
            raise ValueError("a bug in the loop")
        optimizer.step()
        state.seen += 1
        time.sleep(0.004)
    if epoch == 0 and first and model.comm.rank == 0:
        say({"size": model.comm.size})
    if epoch + 1 >= epochs and model.comm.size == int(os.environ["WORLD_SIZE"]):
        break
weights = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
ended = {
    "end": model.comm.rank,
    "size": model.comm.size,
    "weights": hashlib.sha256(weights).hexdigest(),
    "loss": loss.item(),
    "steps": model.steps,
    "seen": state.seen,
    "recoveries": model.recovery.recoveries,
}
say(ended)
