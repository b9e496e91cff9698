"""A graph network that finds communities, on graphs of different sizes.

ringred run --ranks 2 examples/graph_network.py
ringred run --ranks 2 examples/graph_network.py --short

Each rank has graphs of its own, and not as many: `join` lets a rank that has no more go along with the others.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred

COMMUNITIES = 3


class Graph(NamedTuple):
    """Nodes have `features` (nodes, 8) and a community (nodes,); `links` (2, directed links) are pairs of nodes."""

    features: Tensor
    links: Tensor
    communities: Tensor


def graph(generator: torch.Generator) -> Graph:
    """Of 40 to 120 nodes with eight links each, of which two in three lead into a node's own community. A node in ten
    tells its own."""
    nodes = int(torch.randint(40, 121, (1,), generator=generator))
    communities = torch.randint(COMMUNITIES, (nodes,), generator=generator)
    same = communities[:, None] == communities[None]
    chance = torch.where(same, 16 / nodes, 4 / nodes)
    linked = torch.rand(nodes, nodes, generator=generator).triu(1) < chance.triu(1)
    links = (linked | linked.T).nonzero().T
    features = torch.zeros(nodes, 8)
    known = torch.rand(nodes, generator=generator) < 0.1
    features[known, communities[known]] = 1.0
    features[:, COMMUNITIES:] = 0.1 * torch.randn(nodes, 8 - COMMUNITIES, generator=generator)
    return Graph(features, links, communities)


class Layer(nn.Module):
    """Each node takes the mean of what its neighbours send (Hamilton et al. 2017)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.own, self.of_neighbours = nn.Linear(before, after), nn.Linear(before, after, bias=False)

    def forward(self, states: Tensor, links: Tensor) -> Tensor:
        sender, receiver = links
        degree = torch.zeros(len(states)).index_add(0, receiver, torch.ones(len(receiver))).clamp(min=1)
        sent = torch.zeros_like(states).index_add(0, receiver, states[sender]) / degree[:, None]
        found: Tensor = self.own(states) + self.of_neighbours(sent)
        return found


class Network(nn.Module):
    """Three rounds of messages."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(8, width), Layer(width, width), Layer(width, width)])
        self.head = nn.Linear(width, COMMUNITIES)

    def forward(self, features: Tensor, links: Tensor) -> Tensor:
        states = features
        for layer in self.layers:
            states = F.normalize(F.relu(layer(states, links)), dim=1)
        scores: Tensor = self.head(states)
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--graphs", type=int, default=100, help="of rank 0; each further rank has five less")
    parser.add_argument("--short", action="store_true", help="under a minute on two cores")
    options = parser.parse_args()
    if options.short:
        options.epochs, options.graphs = 6, 60

    comm = ringred.init()
    torch.manual_seed(0)
    net = Network(64)
    model = ringred.DistributedDataParallel(net, bucket_cap_mb=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1 + comm.rank)
    graphs = [graph(generator) for _ in range(max(1, options.graphs - 5 * comm.rank))]
    began = time.monotonic()
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        with model.join():
            for features, links, communities in graphs:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(features, links), communities)
                loss.backward()
                optimizer.step()
                total += loss.item()
        if comm.rank == 0 and epoch % max(1, options.epochs // 4) == 0:
            print(f"epoch {epoch}: loss {total / len(graphs):.3f}", flush=True)

    net.eval()
    right = torch.zeros(2)
    with torch.no_grad():
        for features, links, communities in (graph(generator) for _ in range(50)):
            right += torch.tensor([(net(features, links).argmax(1) == communities).sum(), len(communities)])
    comm.all_reduce(right)
    if comm.rank == 0:
        seconds = time.monotonic() - began
        print(f"{comm.size} ranks: {right[0] / right[1]:.1%} of the nodes of new graphs are right, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
