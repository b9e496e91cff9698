"""The models of ddp_differential.py, with the arguments that each is wrapped with."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# What goes with every model, and what some models ask for.
PLAIN = [
    {},
    {"bucket_cap_mb": 0.002},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.002},
    {"find_unused_parameters": True},
    {"static_graph": True, "bucket_cap_mb": 0.002},
    {"forward_sync_buffers": False},
    {"init_sync": False},
    {"batched_grad_copy": True},
    {"bucket_cap_mb_list": [0.001, 0.003]},
]


UNUSED = [
    {"find_unused_parameters": True},
    {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 0.002},
    {"static_graph": True},
]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, num_layers=2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.lstm(x.flatten(1)[:, :64].reshape(-1, 8, 8))[0][:, -1])


class TiedTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.block = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.block(self.embed(tokens(x)))).mean(1)


class SparseEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 6, sparse=True), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.embed(tokens(x)).mean(1))


class Branches(nn.Module):
    """Its right branch is used by odd ranks, or in odd steps, and one layer by nobody."""

    def __init__(self, by_rank):
        super().__init__()
        self.left, self.right, self.never = nn.Linear(64, 5), nn.Linear(64, 5), nn.Linear(64, 5)
        self.by_rank, self.step = by_rank, 0

    def forward(self, x):
        x = x.flatten(1)[:, :64]
        self.step += 1
        odd = (dist.get_rank() if self.by_rank else self.step) % 2
        return self.left(x) + (self.right(x) if odd else 0)


class NeverUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.never = nn.Linear(64, 8), nn.Linear(8, 5), nn.Linear(64, 5)

    def forward(self, x):
        return self.two(F.relu(self.one(x.flatten(1)[:, :64])))


class Shared(nn.Module):
    """One layer is passed three times."""

    def __init__(self):
        super().__init__()
        self.into, self.shared, self.out = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.into(x.flatten(1)[:, :64])
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.out(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant, times=1):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.reentrant, self.times = reentrant, times

    def forward(self, x):
        x = F.relu(self.one(x.flatten(1)[:, :64]))
        for _ in range(self.times):
            x = checkpoint(lambda y: F.relu(self.two(y)), x, use_reentrant=self.reentrant)
        return self.three(x)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 5, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return (x.flatten(1)[:, :64].to(torch.complex64) @ self.weight).abs() + self.bias


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x.flatten(1)[:, :64]).float()


class Outputs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one, self.two, self.kind = nn.Linear(64, 5), nn.Linear(64, 5), kind

    def forward(self, x):
        x = x.flatten(1)[:, :64]
        first, second = self.one(x), self.two(x)
        return {"dict": {"a": first, "b": [second]}, "tuple": (first, second)}[self.kind]


def tokens(x):
    return (x.flatten(1)[:, :10] * 100).long().abs() % 16


class Compiled(nn.Module):
    """A container of one's own, for the compiler leaves those of torch alone."""

    def __init__(self):
        super().__init__()
        self.body = convolutions()

    def forward(self, x):
        return self.body(x)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def residual():
    return nn.Sequential(Residual(), Residual(), nn.Flatten(), nn.Linear(4 * 64, 5))


def frozen():
    model = convolutions()
    model[0].requires_grad_(False)
    return model


def summed(outputs):
    """One tensor of a model's outputs."""
    if isinstance(outputs, dict):
        return outputs["a"] + outputs["b"][0]
    return outputs[0] * outputs[1] if isinstance(outputs, tuple) else outputs


MODELS = {
    "cnn": (convolutions, [*PLAIN, {"broadcast_buffers": False}]),
    "resnet_batchnorm": (residual, [*PLAIN, {"broadcast_buffers": False}]),
    "lstm": (Recurrent, PLAIN),
    "tied_transformer": (TiedTransformer, PLAIN),
    "sparse_embedding": (SparseEmbedding, [o for o in PLAIN if "batched_grad_copy" not in o]),
    "unused_by_rank": (lambda: Branches(True), UNUSED[:2]),
    "unused_by_step": (lambda: Branches(False), UNUSED[:2]),
    "never_used": (
        NeverUsed,
        [*UNUSED, {"find_unused_parameters": True, "skip_all_reduce_unused_params": True, "bucket_cap_mb": 0.0001}],
    ),
    "shared_module": (Shared, PLAIN),
    "checkpointed": (lambda: Checkpointed(False), PLAIN),
    "checkpointed_twice": (lambda: Checkpointed(False, times=2), PLAIN),
    "checkpointed_reentrant": (lambda: Checkpointed(True), [{}, {"bucket_cap_mb": 0.002}, {"static_graph": True}]),
    "checkpointed_reentrant_twice": (lambda: Checkpointed(True, times=2), [{"static_graph": True}]),
    "complex": (Complex, PLAIN),
    "bf16_autocast": (Autocast, PLAIN),
    "frozen": (frozen, PLAIN),
    "tuple_outputs": (lambda: Outputs("tuple"), PLAIN),
    "dict_outputs": (lambda: Outputs("dict"), PLAIN),
}
