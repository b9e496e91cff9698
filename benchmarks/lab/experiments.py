"""The laboratory's experiments: what is measured, on which network."""

from __future__ import annotations

from typing import Any

from lab.cases import Case, Experiment
from lab.hosts import Network

__all__ = ["EXPERIMENTS", "PEERS", "SHORT"]

_WAYS = ("ring", "halving_doubling", "torus", "double_tree", "direct", "tree", "central", "auto")
_SIZES = (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
PEERS = ("gloo", "native", "MPI_Allreduce")  # `native` is MPI_Iallreduce, with our deadlines
_GRADIENTS = ("alone", "ring", "halving_doubling", "torus", "tree", "double_tree", "auto", "central", "gloo")
_SERVERS = tuple(f"{kind}:{policy}" for kind in ("server", "servers") for policy in ("sync", "k_sync:3", "async"))
_BY_HOST = tuple(f"hosts:{policy}" for policy in ("sync", "k_sync:3", "async"))


def _each(models: tuple[str, ...], ways: tuple[str, ...], dilation: float, **others: Any) -> list[Case]:
    return [Case(model, way, dilation, **others) for model in models for way in ways]


EXPERIMENTS: dict[str, Experiment] = {
    "reduce-4-torch": Experiment(
        "What part of the line do the algorithms use between 4 hosts, over Gloo's point-to-point?",
        (Network(4, 250, dilation=4),),
        "torch",
        (*_WAYS, "gloo"),
        _SIZES,
    ),
    "reduce-4-mpi": Experiment(
        "The same over Open MPI's TCP, beside its own all-reduce and Gloo's.",
        (Network(4, 250, dilation=4),),
        "mpi",
        (*_WAYS, *PEERS),
        _SIZES,
    ),
    "reduce-8-mpi": Experiment(
        "And between 8 hosts?",
        (Network(8, 125, dilation=8),),
        "mpi",
        ("ring", "halving_doubling", "torus", "direct", "central", "auto", *PEERS),
        (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "reduce-8-torch": Experiment(
        "Between 8 hosts over Gloo's point-to-point?",
        (Network(8, 125, dilation=8),),
        "torch",
        ("ring", "halving_doubling", "torus", "auto", "gloo"),
        _SIZES,
    ),
    "reduce-16-mpi": Experiment(
        "Between 16?",
        (Network(16, 62.5, dilation=16),),
        "mpi",
        ("ring", "halving_doubling", "torus", "auto", "native"),  # 16 ranks that poll in MPI_Allreduce fill two cores
        (64 << 10, 1 << 20, 4 << 20),
    ),
    "bbr": Experiment(
        "And where TCP's congestion control is BBR, which measures what a connection gets?",
        (Network(4, 250, control="bbr", dilation=4),),
        "torch",
        ("ring", "halving_doubling", "torus", "auto", "gloo"),
        (1 << 20, 4 << 20, 16 << 20),
    ),
    "racks": Experiment(
        "Two racks of four hosts with an uplink of one host's rate each: does the torus win, or the ring?",
        (Network(8, 250, racks=2, uplink_mbit=250, dilation=4),),
        "mpi",
        ("ring", "torus", "halving_doubling", "direct", "tree", "central"),
        (64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "racks-slow": Experiment(
        "And with an uplink of a quarter of that?",
        (Network(8, 250, racks=2, uplink_mbit=62.5, dilation=4),),
        "mpi",
        ("ring", "torus", "halving_doubling", "double_tree"),
        (64 << 10, 256 << 10, 1 << 20, 4 << 20),
    ),
    "slow-link": Experiment(
        "One host of four has a quarter of the others' rate: who suffers least?",
        (Network(4, 500, slow_mbit=125),),
        "mpi",
        ("ring", "halving_doubling", "torus", "double_tree", "direct", "tree", "central"),
        (64 << 10, 1 << 20, 4 << 20),
    ),
    "slow-link-steps": Experiment(
        "And in a training step?",
        (Network(4, 500, slow_mbit=125, dilation=20),),
        "torch",
        cases=lambda hosts: _each(
            ("resnet50", "lstm"),
            ("alone", "ring", "halving_doubling", "torus", "double_tree", "auto", "gloo", "servers:sync"),
            20,
        ),
        steps=1,
    ),
    "steps": Experiment(
        "How much of a training step is left of a P100's on 10 Gbit/s (all times and the rate 20 times slower)?",
        (Network(4, 500, dilation=20),),
        "torch",
        cases=lambda hosts: _each(("resnet50", "alexnet", "lstm"), _GRADIENTS, 20),
        steps=2,
    ),
    "steps-others": Experiment(
        "The same for models of other shapes?",
        (Network(4, 500, dilation=20),),
        "torch",
        cases=lambda hosts: _each(
            ("inception", "graph", "experts", "bert", "vgg16"), tuple(way for way in _GRADIENTS if way != "central"), 20
        ),
        steps=1,
    ),
    "steps-mpi": Experiment(
        "And over Open MPI's TCP, beside its own all-reduce and torch's DDP on Gloo?",
        (Network(4, 500, dilation=20),),
        "mpi",
        cases=lambda hosts: [
            *_each(("resnet50", "lstm"), ("alone", "ring", "halving_doubling", "auto", "native", "gloo"), 20),
            *_each(
                ("alexnet", "inception", "graph", "experts", "bert", "vgg16"), ("alone", "ring", "native", "gloo"), 20
            ),
        ],
        steps=1,
    ),
    "hierarchy": Experiment(
        "Two ranks on each of four hosts: what does it save to add within a host first?",
        (Network(4, 500, each=2),),
        "torch",
        ("ring", "hierarchical", "torus", "halving_doubling", "auto", "gloo"),
        (64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "hierarchy-steps": Experiment(
        "And in a training step?",
        (Network(4, 500, each=2, dilation=20),),
        "torch",
        cases=lambda hosts: [
            *_each(("resnet50",), ("alone", "ring", "hierarchical", "auto", "gloo"), 20),
            *_each(
                ("lstm", "alexnet", "inception", "graph", "experts", "bert", "vgg16"),
                ("alone", "ring", "hierarchical", "gloo"),
                20,
            ),
        ],
        steps=1,
    ),
    "hierarchy-servers": Experiment(
        "And by parameter servers, flat and with the ranks of a host as one worker (hosts), for a graph network?",
        (Network(4, 100, each=2, dilation=20),),
        "torch",
        cases=lambda hosts: _each(
            ("graph",),
            ("alone", "ring", "hierarchical", "servers:sync", *_BY_HOST),
            20,
        ),
        steps=8,
    ),
    "hierarchy-servers-others": Experiment(
        "And for models of other shapes, whose bytes are encrypted by the few cores that all hosts share?",
        (Network(4, 500, each=2, dilation=20),),
        "torch",
        cases=lambda hosts: [
            *_each(("lstm", "resnet50"), _BY_HOST, 20),
            *_each(("inception", "alexnet", "bert", "experts"), ("hosts:sync",), 20),
        ],
        steps=1,
    ),
    "server": Experiment(
        "The traffic of one server (the all-reduce central) against a ring's for VGG-16 on 8 hosts: N (P-1) bytes in "
        "and out of its port at once, or 2 N (P-1)/P through each?",
        (Network(8, 500, dilation=20),),
        "torch",
        cases=lambda hosts: _each(("vgg16",), ("alone", "ring", "direct", "central"), 20),
        steps=1,
    ),
    "servers": Experiment(
        "The parameter server as it is (messages, keys), with one server and with one on each host, by policy, for a "
        "graph network?",
        (Network(4, 100, dilation=20),),
        "torch",
        cases=lambda hosts: _each(
            ("graph",),
            (
                *("alone", "ring", "server:sync", "servers:sync", "servers:k_sync:3", "servers:async"),
                *("server:async", "server:k_sync:3", "servers:k_async:2"),
            ),
            20,
        ),
        steps=8,
    ),
    "servers-others": Experiment(
        "And for models of other shapes, whose bytes are encrypted by the few cores that all hosts share?",
        (Network(4, 500, dilation=20),),
        "torch",
        cases=lambda hosts: [
            *_each(("lstm", "resnet50"), _SERVERS, 20),
            *_each(("inception", "alexnet", "experts", "bert", "vgg16"), ("servers:sync", "servers:async"), 20),
        ],
        steps=1,
    ),
    "scaling": Experiment(
        "ResNet-50 on 2, 4 and 8 hosts: the same batch on each (weak), or divided among them (strong)?",
        (Network(2, 500, dilation=20), Network(4, 500, dilation=20), Network(8, 500, dilation=20)),
        "torch",
        cases=lambda hosts: [
            *(Case("resnet50", way, 20, label="weak") for way in ("ring", "gloo")),
            *(Case("resnet50", way, 20, batch=32 // hosts, label="strong") for way in ("ring", "gloo")),
        ],
        steps=3,
    ),
    "ratio": Experiment(
        "How much computation hides the communication of ResNet-50 (2.5 to 80 times that of a P100, one network)?",
        (Network(4, 500),),
        "torch",
        cases=lambda hosts: [
            Case("resnet50", way, times, label=f"x{times:g}")
            for times in (2.5, 5, 10, 20, 40, 80)
            for way in ("ring", "gloo")
        ],
        steps=1,
    ),
    "buckets": Experiment(
        "What do buckets of other sizes change for ResNet-50?",
        (Network(4, 500, dilation=20),),
        "torch",
        cases=lambda hosts: [
            Case("resnet50", way, 20, cap_mib=cap, label=f"{cap:g} MiB")
            for cap in (1, 5, 25, 100)
            for way in ("ring", "double_tree", "gloo")
        ],
        steps=2,
    ),
    "stragglers": Experiment(
        "One host computes 1.5 or 2 times as long: what do those lose that wait for it, and those that need not?",
        (Network(4, 100, dilation=20),),
        "torch",
        cases=lambda hosts: [
            Case("graph", way, 20, slowness=slowness, label=f"x{slowness:g}")
            for slowness in (1.0, 1.5, 2.0)
            for way in ("ring", "gloo", "servers:sync", "servers:k_sync:3", "servers:async")
        ],
        steps=8,
    ),
    "replay": Experiment(
        "Does a replayed model take as long as the real one that was recorded (500 Mbit/s, nothing slowed down)?",
        (Network(2, 500),),
        "torch",
        cases=lambda hosts: [
            Case(f"{kind}:{name}", way)
            for name in ("mlp", "cnn")
            for way in ("alone", "ring", "gloo")
            for kind in ("real", "replayed")
        ],
        steps=15,
    ),
    "accuracy": Experiment(
        "How long until the digits are 97 % right, and a small GPT needs 2.3 nats a byte, on 4 hosts of 100 Mbit/s?",
        (Network(4, 100),),
        "torch",
        ("alone", "ring", "gloo", "servers:sync", "servers:async"),
        trainings=("digits", "gpt"),
    ),
}
SHORT = Experiment(
    "Four hosts, a few sizes: the laboratory in a minute.",
    (Network(4, 500),),
    "torch",
    ("ring", "halving_doubling", "central", "auto", "gloo"),
    (64 << 10, 1 << 20),
    seconds=0.3,
)
