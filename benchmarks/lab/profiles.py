"""Models as the laboratory replays them: the parameters of each layer, and how long its backward takes.

Sizes are the true ones, layer by layer, in the order of forward. Times follow from the multiplications of a layer (two
floating-point operations each in forward, four in backward) on a processor of a stated speed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MODELS", "Layer", "Processor", "Profile", "profile", "read"]


@dataclass(frozen=True)
class Layer:
    """`elements` parameters, and the multiplications that one sample takes in forward."""

    name: str
    elements: int
    multiplications: float


@dataclass(frozen=True)
class Processor:
    """A processor that sustains `flops` floating-point operations a second in training."""

    name: str
    flops: float


P100 = Processor("P100 at 4.5 Tflop/s", 4.5e12)


@dataclass(frozen=True)
class Profile:
    """A model for batches of `batch` samples on a processor; times are in seconds, of each layer in forward order.
    `recorded` are measured ones: of each layer's backward, and last of forward."""

    name: str
    layers: tuple[Layer, ...]
    batch: int
    processor: Processor
    recorded: tuple[float, ...] = ()

    @property
    def elements(self) -> int:
        """All parameters."""
        return sum(layer.elements for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """The bytes of all gradients, in float32."""
        return 4 * self.elements

    @property
    def backward(self) -> list[float]:
        """Seconds of each layer's backward."""
        if self.recorded:
            return list(self.recorded[:-1])
        return [4 * layer.multiplications * self.batch / self.processor.flops for layer in self.layers]

    @property
    def forward(self) -> float:
        """Seconds of forward."""
        return self.recorded[-1] if self.recorded else sum(self.backward) / 2

    @property
    def seconds(self) -> float:
        """Of a step of one processor alone."""
        return self.forward + sum(self.backward)


def _convolution(name: str, inputs: int, outputs: int, kernel: int, size: int, bias: bool = True) -> Layer:
    weights = inputs * outputs * kernel * kernel
    return Layer(name, weights + outputs * bias, weights * size * size)


def _linear(name: str, inputs: int, outputs: int, times: float = 1.0, bias: bool = True) -> Layer:
    return Layer(name, inputs * outputs + outputs * bias, inputs * outputs * times)


def alexnet() -> list[Layer]:
    """Krizhevsky (2014), as torchvision has it: 61.1 M parameters."""
    shapes = [(3, 64, 11, 55), (64, 192, 5, 27), (192, 384, 3, 13), (384, 256, 3, 13), (256, 256, 3, 13)]
    layers = [_convolution(f"conv{at}", *shape) for at, shape in enumerate(shapes)]
    return [*layers, _linear("fc6", 9216, 4096), _linear("fc7", 4096, 4096), _linear("fc8", 4096, 1000)]


def vgg16() -> list[Layer]:
    """Simonyan and Zisserman (2015): 138.4 M parameters."""
    widths = [(64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)]
    layers, before, size = [], 3, 224
    for block, outputs in enumerate(widths):
        for at, width in enumerate(outputs):
            layers.append(_convolution(f"conv{block}.{at}", before, width, 3, size))
            before = width
        size //= 2
    return [*layers, _linear("fc6", 25088, 4096), _linear("fc7", 4096, 4096), _linear("fc8", 4096, 1000)]


def resnet50() -> list[Layer]:
    """He et al. (2016): 25.6 M parameters; batch normalisations count with their convolutions."""
    return _resnet((3, 4, 6, 3))


def resnet101() -> list[Layer]:
    """The same with 101 layers: 44.5 M parameters."""
    return _resnet((3, 4, 23, 3))


def _resnet(blocks_of: tuple[int, int, int, int]) -> list[Layer]:

    def normalised(name: str, inputs: int, outputs: int, kernel: int, size: int) -> Layer:
        layer = _convolution(name, inputs, outputs, kernel, size, bias=False)
        return Layer(name, layer.elements + 2 * outputs, layer.multiplications)

    layers, before = [normalised("stem", 3, 64, 7, 112)], 64
    shapes = zip((64, 128, 256, 512), blocks_of, (56, 28, 14, 7), strict=True)
    for stage, (width, blocks, size) in enumerate(shapes):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            layers.append(normalised(f"{name}.1", before, width, 1, size if block or not stage else 2 * size))
            layers.append(normalised(f"{name}.2", width, width, 3, size))
            layers.append(normalised(f"{name}.3", width, 4 * width, 1, size))
            if not block:
                layers.append(normalised(f"{name}.down", before, 4 * width, 1, size))
            before = 4 * width
    return [*layers, _linear("fc", 2048, 1000)]


def inception() -> list[Layer]:
    """Like Inception V3 (Szegedy et al. 2016): 23.8 M parameters, 5.7 G multiplications, many layers of like size."""
    sizes = [(0.02, 0.3)] * 5 + [(0.3, 0.35)] * 9 + [(1.3, 0.2)] * 8 + [(4.3, 0.13)] * 2
    total, work = sum(size for size, _ in sizes), sum(part for _, part in sizes)
    layers = [
        Layer(f"mixed{at}", int(21.8e6 * size / total), 5.7e9 * part / work) for at, (size, part) in enumerate(sizes)
    ]
    return [*layers, _linear("fc", 2048, 1000)]


def lstm() -> list[Layer]:
    """A word-level language model (Zaremba et al. 2014, medium): embedding, two layers of 650, a softmax; 35 words."""
    words, width, steps = 10_000, 650, 35
    return [
        Layer("embedding", words * width, 0.0),
        *(_linear(f"lstm{at}", 2 * width, 4 * width, steps) for at in range(2)),
        _linear("softmax", width, words, steps),
    ]


def bert() -> list[Layer]:
    """BERT-base (Devlin et al. 2019), 128 tokens: 110 M parameters."""
    width, tokens = 768, 128
    layers = [Layer("embedding", (30_522 + 512 + 2) * width, 0.0)]
    for at in range(12):
        attention = 2.0 * tokens * tokens * width
        layers.append(_linear(f"{at}.qkv", width, 3 * width, tokens))
        projected = _linear(f"{at}.out", width, width, tokens)
        layers.append(Layer(projected.name, projected.elements, projected.multiplications + attention))
        layers.append(_linear(f"{at}.up", width, 4 * width, tokens))
        layers.append(_linear(f"{at}.down", 4 * width, width, tokens))
    return [*layers, _linear("head", width, width, tokens)]


def graph() -> list[Layer]:
    """A graph network of three layers of 256 over 100,000 edges a batch element's share: small and slow."""
    return [_linear(f"layer{at}", 256 if at else 128, 256, 3000) for at in range(3)] + [_linear("head", 256, 47, 3000)]


def experts() -> list[Layer]:
    """A transformer whose six blocks have eight experts each, of which a token takes one (Fedus et al. 2021)."""
    width, tokens = 512, 128
    layers = [Layer("embedding", 32_000 * width, 0.0)]
    for at in range(6):
        layers.append(_linear(f"{at}.attention", width, 4 * width, tokens))
        layers += [_linear(f"{at}.expert{n}", width, 8 * width, tokens / 8) for n in range(8)]
    return layers


MODELS: dict[str, tuple[Callable[[], list[Layer]], int]] = {
    "alexnet": (alexnet, 128),
    "vgg16": (vgg16, 32),
    "resnet50": (resnet50, 32),
    "resnet101": (resnet101, 32),
    "inception": (inception, 32),
    "lstm": (lstm, 20),
    "bert": (bert, 16),
    "graph": (graph, 32),
    "experts": (experts, 16),
}
"""By name: the layers, and the batch of a processor."""


def profile(name: str, batch: int | None = None, processor: Processor = P100) -> Profile:
    """One of `MODELS`."""
    make, usual = MODELS[name]
    return Profile(name, tuple(make()), batch or usual, processor)


def read(name: str, batch: int | None = None) -> Profile:
    """One of `MODELS`, or what `lab record` wrote to a file of this name."""
    if name in MODELS:
        return profile(name, batch)
    found = json.loads(Path(name).read_text())
    layers = tuple(Layer(layer, elements, 0.0) for layer, elements in found["layers"])
    return Profile(found["name"], layers, found["batch"], Processor(found["processor"], 0.0), tuple(found["recorded"]))
