"""Trains the digits of train_digits.py on ranks that may fail: the others go on, and processes take their places.

ringred run --ranks 4 examples/train_elastic.py
ringred run --ranks 4 examples/train_elastic.py --checkpoints out/elastic     # goes on from the newest one

Try it: kill one of the processes that `ringred status` names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from train_digits import digits, make_model

import ringred


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--checkpoints", type=Path, help="a folder that all ranks see")
    options = parser.parse_args()

    ringred.init()
    train, test = digits()
    net = make_model()
    model = ringred.DistributedDataParallel(net, on_failure="shrink")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    sampler = ringred.ElasticSampler(train, 24, model)
    state = ringred.Elastic(model, optimizer, sampler)
    checkpoints = None if options.checkpoints is None else ringred.checkpoint.Checkpoints(options.checkpoints, model)
    if checkpoints is not None and (found := checkpoints.newest()) is not None:
        state.load_state_dict(found.state)

    loader = DataLoader(train, batch_sampler=sampler)
    for epoch in state.epochs(options.epochs):
        net.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            images, labels = test[:]
            right = (net(images).argmax(1) == labels).float().mean()
        if model.comm.rank == 0:
            print(f"epoch {epoch}: {model.comm.size} ranks, accuracy {right:.3f}", flush=True)
        if checkpoints is not None:
            checkpoints.save(epoch, state.state_dict())
    if checkpoints is not None:
        checkpoints.wait()


if __name__ == "__main__":
    main()
