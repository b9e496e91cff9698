"""The laboratory's experiments: what is measured, on which network."""

from __future__ import annotations

from lab.cases import Case, Experiment
from lab.network import Network

__all__ = ["EXPERIMENTS", "PEERS", "SHORT"]

_WAYS = ("ring", "halving_doubling", "torus", "double_tree", "direct", "tree", "central", "auto")
_SIZES = (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
PEERS = ("gloo", "native", "MPI_Allreduce")  # `native` is MPI_Iallreduce, with our deadlines
_GRADIENTS = ("alone", "ring", "halving_doubling", "torus", "tree", "double_tree", "auto", "central", "gloo")
_SERVERS = tuple(f"{kind}:{policy}" for kind in ("server", "servers") for policy in ("sync", "k_sync:3", "async"))
_BY_HOST = tuple(f"hosts:{policy}" for policy in ("sync", "k_sync:3", "async"))


def _each(network: Network, models: tuple[str, ...], ways: tuple[str, ...]) -> list[Case]:
    """Each model by each way, as many times slower as the network."""
    return [Case(model, way, network.dilation) for model in models for way in ways]


EXPERIMENTS: dict[str, Experiment] = {
    "reduce-4-torch": Experiment(
        "All-reduces between 4 hosts over Gloo's point-to-point: what part of the line do the algorithms use?",
        (Network(4, 250, dilation=4),),
        "torch",
        (*_WAYS, "gloo"),
        _SIZES,
    ),
    "reduce-4-mpi": Experiment(
        "All-reduces between 4 hosts over Open MPI's TCP, beside its own and Gloo's: what part of the line?",
        (Network(4, 250, dilation=4),),
        "mpi",
        (*_WAYS, *PEERS),
        _SIZES,
    ),
    "reduce-8-mpi": Experiment(
        "All-reduces between 8 hosts over Open MPI's TCP, beside its own and Gloo's: what part of the line?",
        (Network(8, 125, dilation=8),),
        "mpi",
        ("ring", "halving_doubling", "torus", "direct", "central", "auto", *PEERS),
        (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "reduce-8-torch": Experiment(
        "All-reduces between 8 hosts over Gloo's point-to-point: what part of the line?",
        (Network(8, 125, dilation=8),),
        "torch",
        ("ring", "halving_doubling", "torus", "auto", "gloo"),
        _SIZES,
    ),
    "reduce-16-mpi": Experiment(
        "All-reduces between 16 hosts over Open MPI's TCP: what part of the line?",
        (Network(16, 62.5, dilation=16),),
        "mpi",
        # 16 ranks that poll in MPI_Allreduce fill two cores.
        ("ring", "halving_doubling", "torus", "double_tree", "tree", "auto", "native"),
        (1 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "bbr": Experiment(
        "All-reduces with TCP's BBR, which measures what a connection gets: what part of the line?",
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
        "Two racks with an uplink of a quarter of a host's rate: torus or ring?",
        (Network(8, 250, racks=2, uplink_mbit=62.5, dilation=4),),
        "mpi",
        ("ring", "torus", "halving_doubling", "double_tree"),
        (64 << 10, 256 << 10, 1 << 20, 4 << 20),
    ),
    "slow-link": Experiment(
        "All-reduces where one host of four has a quarter of the others' rate: who suffers least?",
        (Network(4, 500, slow_mbit=125),),
        "mpi",
        ("ring", "halving_doubling", "torus", "double_tree", "direct", "tree", "central"),
        (64 << 10, 1 << 20, 4 << 20),
    ),
    "slow-link-steps": Experiment(
        "Training steps where one host of four has a quarter of the others' rate: who suffers least?",
        (Network(4, 500, slow_mbit=125, dilation=20),),
        "torch",
        cases=lambda network: _each(
            network,
            ("resnet50", "lstm"),
            ("alone", "ring", "halving_doubling", "torus", "double_tree", "auto", "gloo", "servers:sync"),
        ),
        steps=1,
    ),
    "steps": Experiment(
        "How much of a training step is left of a P100's on 10 Gbit/s (all times and the rate 20 times slower)?",
        (Network(4, 500, dilation=20),),
        "torch",
        cases=lambda network: _each(network, ("resnet50", "alexnet", "lstm"), _GRADIENTS),
        steps=2,
    ),
    "steps-others": Experiment(
        "Training steps of models of other shapes: how much is left?",
        (Network(4, 500, dilation=20),),
        "torch",
        cases=lambda network: _each(
            network,
            ("inception", "graph", "experts", "bert", "vgg16"),
            tuple(way for way in _GRADIENTS if way != "central"),
        ),
        steps=1,
    ),
    "steps-mpi": Experiment(
        "Training steps over Open MPI's TCP, beside its own all-reduce and torch's DDP on Gloo: how much is left?",
        (Network(4, 500, dilation=20),),
        "mpi",
        cases=lambda network: [
            *_each(network, ("resnet50", "lstm"), ("alone", "ring", "halving_doubling", "auto", "native", "gloo")),
            *_each(
                network,
                ("alexnet", "inception", "graph", "experts", "bert", "vgg16"),
                ("alone", "ring", "native", "gloo"),
            ),
        ],
        steps=1,
    ),
    "hierarchy": Experiment(
        "All-reduces of two ranks on each of four hosts: what does it save to add within a host first?",
        (Network(4, 500, each=2),),
        "torch",
        ("ring", "hierarchical", "torus", "halving_doubling", "auto", "gloo"),
        (64 << 10, 1 << 20, 4 << 20, 16 << 20),
    ),
    "hierarchy-steps": Experiment(
        "Training steps of two ranks on each of four hosts: what does it save to add within a host first?",
        (Network(4, 500, each=2, dilation=20),),
        "torch",
        cases=lambda network: [
            *_each(network, ("resnet50",), ("alone", "ring", "hierarchical", "auto", "gloo")),
            *_each(
                network,
                ("lstm", "alexnet", "inception", "graph", "experts", "bert", "vgg16"),
                ("alone", "ring", "hierarchical", "gloo"),
            ),
        ],
        steps=1,
    ),
    "hierarchy-servers": Experiment(
        "Two ranks on each of four hosts and parameter servers, flat and with a host's ranks as one worker (hosts), "
        "for a graph network?",
        (Network(4, 100, each=2, dilation=20),),
        "torch",
        cases=lambda network: _each(
            network,
            ("graph",),
            ("alone", "ring", "hierarchical", "servers:sync", *_BY_HOST),
        ),
        steps=8,
    ),
    "hierarchy-servers-others": Experiment(
        "The ranks of a host as one worker of parameter servers, for large models, whose bytes are encrypted by the "
        "few cores that all hosts share?",
        (Network(4, 500, each=2, dilation=20),),
        "torch",
        cases=lambda network: [
            *_each(network, ("lstm", "resnet50"), _BY_HOST),
            *_each(network, ("inception", "alexnet", "bert", "experts"), ("hosts:sync",)),
        ],
        steps=1,
    ),
    "server": Experiment(
        "The traffic of one server (the all-reduce central) against a ring's for VGG-16 on 8 hosts: N (P-1) bytes in "
        "and out of its port at once, or 2 N (P-1)/P through each?",
        (Network(8, 500, dilation=20),),
        "torch",
        cases=lambda network: _each(network, ("vgg16",), ("alone", "ring", "direct", "central")),
        steps=1,
    ),
    "servers": Experiment(
        "The parameter server as it is (messages, keys), with one server and with one on each host, by policy, for a "
        "graph network?",
        (Network(4, 100, dilation=20),),
        "torch",
        cases=lambda network: _each(
            network,
            ("graph",),
            (
                *("alone", "ring", "server:sync", "servers:sync", "servers:k_sync:3", "servers:async"),
                *("server:async", "server:k_sync:3", "servers:k_async:2"),
            ),
        ),
        steps=8,
    ),
    "servers-others": Experiment(
        "Parameter servers for large models, whose bytes are encrypted by the few cores that all hosts share?",
        (Network(4, 500, dilation=20),),
        "torch",
        cases=lambda network: [
            *_each(network, ("lstm", "resnet50"), _SERVERS),
            *_each(network, ("inception", "alexnet", "experts", "bert", "vgg16"), ("servers:sync", "servers:async")),
        ],
        steps=1,
    ),
    "scaling": Experiment(
        "ResNet-50 on 2, 4 and 8 hosts: the same batch on each (weak), or divided among them (strong)?",
        (Network(2, 500, dilation=20), Network(4, 500, dilation=20), Network(8, 500, dilation=20)),
        "torch",
        cases=lambda network: [
            *(
                Case("resnet50", way, network.dilation, label="weak")
                for way in ("ring", "torus", "double_tree", "central", "servers:sync", "gloo")
            ),
            *(
                Case("resnet50", way, network.dilation, batch=32 // network.hosts, label="strong")
                for way in ("ring", "gloo")
            ),
        ],
        steps=1,
    ),
    "ratio": Experiment(
        "How much computation hides the communication of ResNet-50 (2.5 to 80 times that of a P100, one network)?",
        (Network(4, 500),),
        "torch",
        cases=lambda network: [
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
        cases=lambda network: [
            Case(
                "resnet50", way, network.dilation, cap_mib=cap, label="1, then 25 MiB" if cap is None else f"{cap} MiB"
            )
            for cap in (None, 1, 5, 25, 100)
            for way in ("ring", "double_tree", "gloo")
        ],
        steps=2,
    ),
    "stragglers": Experiment(
        "One host computes 1.5 or 2 times as long: what do those lose that wait for it, and those that need not?",
        (Network(4, 100, dilation=20),),
        "torch",
        cases=lambda network: [
            Case("graph", way, network.dilation, slowness=slowness, label=f"x{slowness:g}")
            for slowness in (1.0, 1.5, 2.0)
            for way in ("ring", "gloo", "servers:sync", "servers:k_sync:3", "servers:async")
        ],
        steps=8,
    ),
    "replay": Experiment(
        "Does a replayed model take as long as the real one that was recorded (500 Mbit/s, nothing slowed down)?",
        (Network(2, 500),),
        "torch",
        cases=lambda network: [
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
