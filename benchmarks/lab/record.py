"""Records a real model's times, layer by layer, so that the laboratory can replay it where there is no room for it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.profiles import Layer, Processor, Profile
from ringred.topology.detect import machine

__all__ = ["REAL", "load", "record", "write"]

_STEPS = 9


class _Step(nn.Module):
    """A model with a batch of its own: whatever it is called with, it returns the loss."""

    def __init__(self, model: nn.Module, batch: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.model = model
        self.batch, self.labels = batch, labels

    def forward(self, _: object = None) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.batch), self.labels)


def _mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(512, 1024), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    return _Step(nn.Sequential(*layers, nn.Linear(1024, 10)), torch.randn(192, 512), torch.randint(10, (192,)))


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 512), nn.ReLU(), nn.Linear(512, 10))
    return _Step(model, torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))


REAL: dict[str, Callable[[], nn.Module]] = {"mlp": _mlp, "cnn": _cnn}
"""Small models that this machine can train."""


def load(name: str) -> nn.Module:
    """One of `REAL`, or FILE.py:FUNCTION, whose function returns a module that returns its loss when it is called."""
    if name in REAL:
        torch.manual_seed(0)
        return REAL[name]()
    path, _, function = name.rpartition(":")
    found = importlib.util.spec_from_file_location("recorded", path)
    if not path or found is None or found.loader is None or not Path(path).exists():
        raise SystemExit(f"lab: {name!r}: expected {', '.join(REAL)}, or FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    made: nn.Module = getattr(module, function)()
    return made


def record(name: str, model: nn.Module) -> Profile:
    """The profile of a module that returns its loss: medians of a few steps on one processor, after a first one, as
    parts of the median of the whole step."""
    trained = {called: parameter for called, parameter in model.named_parameters() if parameter.requires_grad}
    names = {id(parameter): called for called, parameter in trained.items()}
    came: list[tuple[int, float]] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: came.append((id(p), time.perf_counter())))
        for parameter in trained.values()
    ]
    spans: dict[int, list[float]] = defaultdict(list)
    forwards: list[float] = []
    steps: list[float] = []
    order: list[int] = []
    for _ in range(1 + _STEPS):
        model.zero_grad()
        came.clear()
        began = time.perf_counter()
        loss = model(None)
        forward = time.perf_counter()
        loss.backward()
        order = [at for at, _ in came]
        for (_, before), (at, now) in itertools.pairwise([(0, forward), *came]):
            spans[at].append(now - before)
        forwards.append(forward - began)
        steps.append(came[-1][1] - began)
    for hook in hooks:
        hook.remove()
    sizes = {id(parameter): parameter.numel() for parameter in trained.values()}
    layers = tuple(Layer(names[at], sizes[at], 0.0) for at in reversed(order))
    medians = [statistics.median(took[1:]) for took in (*(spans[at] for at in reversed(order)), forwards)]
    recorded = tuple(median * statistics.median(steps[1:]) / sum(medians) for median in medians)
    return Profile(name, layers, 1, Processor(machine().processor, 0.0), recorded)


def write(path: Path, profile: Profile) -> None:
    """The file that `profiles.read` reads."""
    layers: Any = [[layer.name, layer.elements] for layer in profile.layers]
    found = {**asdict(profile), "layers": layers, "processor": profile.processor.name}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
