"""Gradients of DDP equal one process on the joined batch, and what it says when they would not."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator
from ringred.errors import ModelMismatch, UnsupportedTensor
from ringred.testing import run_ranks

BATCH = 24


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3).to(memory_format=torch.channels_last)
        self.second = nn.Linear(6 * 36, 20)
        self.third = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(F.relu(self.first(x)).flatten(1))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])


class TiedTransformer(nn.Module):
    """Token embedding and output projection share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.block = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :10] * 100).long().abs() % 16
        return self.head(self.block(self.embed(tokens))).mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": Convolutions, "lstm": Recurrent, "transformer": TiedTransformer}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (BATCH,), generator=generator)


def share(comm: Communicator) -> tuple[Tensor, Tensor]:
    images, labels = data()
    return images[comm.rank :: comm.size], labels[comm.rank :: comm.size]


def built(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind]().double()


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 3) -> list[Tensor]:
    """The gradients after `steps` steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_one_process_on_the_joined_batch(kind: str, as_view: bool, size: int) -> None:
    models = [built(kind, seed=rank) for rank in range(size)]

    def body(comm: Communicator) -> list[Tensor]:
        # Every rank starts from another model: rank 0's is what counts.
        model = ringred.DistributedDataParallel(
            models[comm.rank], process_group=comm, bucket_cap_mb=0.005, gradient_as_bucket_view=as_view
        )
        assert len(model.bucket_plan()) >= 2
        return train(model, *share(comm))

    results = run_ranks(body, size)
    reference = train(built(kind), *data())
    for gradients in results:
        for got, wanted in zip(gradients, reference, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    for gradients in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0], strict=True)), "the same bits everywhere"


@pytest.mark.parametrize("algorithm", ["ring", "torus", "tree", "double_tree", "direct"])
def test_any_algorithm_and_transport_gives_the_same_training(algorithm: str) -> None:
    def body(comm: Communicator) -> list[Tensor]:
        model = ringred.DistributedDataParallel(copy.deepcopy(original), process_group=comm, algorithm=algorithm)
        return train(model, *share(comm))

    original = built("cnn")
    reference = train(built("cnn"), *data())
    for got, wanted in zip(run_ranks(body, 3, "torch_p2p")[1], reference, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


def test_buckets_are_rebuilt_in_the_order_in_which_gradients_come() -> None:
    class Backwards(nn.Module):
        """Declared in the order in which it is not used."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    def body(comm: Communicator) -> tuple[list[list[str]], list[list[str]]]:
        model = ringred.DistributedDataParallel(Backwards(), process_group=comm, bucket_cap_mb=1e-4)
        before = model.bucket_plan()
        for _ in range(2):
            model(torch.ones(1, 8)).sum().backward()
        return before, model.bucket_plan()

    (before, after), other = run_ranks(body, 2)
    assert other == (before, after)
    assert before == [["first.bias", "first.weight"], ["middle.bias", "middle.weight"], ["last.bias", "last.weight"]]
    assert [sorted(bucket) for bucket in after] == [sorted(bucket) for bucket in reversed(before)]


def test_no_sync_accumulates_and_the_next_backward_reduces_the_sum() -> None:
    def body(comm: Communicator) -> list[Tensor]:
        torch.manual_seed(0)
        model = ringred.DistributedDataParallel(nn.Linear(3, 2).double(), process_group=comm)
        for turn in range(3):
            inputs = torch.full((1, 3), float(10 * turn + comm.rank), dtype=torch.float64)
            if turn < 2:
                with model.no_sync():
                    model(inputs).sum().backward()
            else:
                model(inputs).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    first, second = run_ranks(body, 2)
    for weight, bias in (first, second):
        assert torch.equal(weight, torch.full((2, 3), 30 + 3 * 0.5, dtype=torch.float64))
        assert torch.equal(bias, torch.full((2,), 3.0, dtype=torch.float64))


class Branches(nn.Module):
    """Uses the left branch, or both, or always leaves one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, both: bool) -> dict[str, Tensor]:
        return {"out": self.left(x) + (self.right(x) if both else 0)}


def test_unused_parameters_are_found_and_keep_their_gradients() -> None:
    def body(comm: Communicator) -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(0)
        model = ringred.DistributedDataParallel(Branches(), process_group=comm, find_unused_parameters=True)
        for _ in range(2):
            model.zero_grad()
            # Only rank 1 uses the right branch: the others get the mean all the same.
            model(torch.ones(1, 4), both=comm.rank == 1)["out"].sum().backward()
        return model.module.right.weight.grad, model.module.never.weight.grad

    for right, never in run_ranks(body, 3):
        assert torch.allclose(right, torch.full((2, 4), 1 / 3))
        assert never is None


def test_without_the_option_unused_parameters_are_named_at_the_next_forward() -> None:
    def body(comm: Communicator) -> str:
        model = ringred.DistributedDataParallel(Branches(), process_group=comm)
        model(torch.ones(1, 4), both=True)["out"].sum().backward()
        with pytest.raises(RuntimeError, match="expected to have finished reduction in the prior iteration") as raised:
            model(torch.ones(1, 4), both=True)
        return str(raised.value)

    for text in run_ranks(body, 2):
        assert "never.weight, never.bias" in text
        assert "find_unused_parameters=True" in text


def test_models_that_differ_are_an_error_on_every_rank_naming_what_differs() -> None:
    def body(comm: Communicator) -> str:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5 if comm.rank == 2 else 2))
        with pytest.raises(ModelMismatch) as raised:
            ringred.DistributedDataParallel(model, process_group=comm)
        assert isinstance(raised.value, RuntimeError)
        return str(raised.value)

    for rank, text in enumerate(run_ranks(body, 3)):
        assert text.startswith(f"rank {rank}: ")
        assert "rank 0 has parameter '1.weight': [2, 3]" in text
        assert "rank 2 has parameter '1.weight': [5, 3]" in text


def test_a_rank_whose_model_is_empty_is_named_too() -> None:
    def body(comm: Communicator) -> str:
        with pytest.raises(ModelMismatch) as raised:
            ringred.DistributedDataParallel(nn.Identity() if comm.rank else nn.Linear(2, 2), process_group=comm)
        return str(raised.value)

    assert all("rank 0 has parameter 'weight'" in text for text in run_ranks(body, 2))


def test_what_cannot_reduce_is_refused_at_construction() -> None:
    def body(comm: Communicator) -> bool:
        with pytest.raises(ringred.UnknownAlgorithm, match="has no all-reduce of its own"):
            ringred.DistributedDataParallel(nn.Linear(2, 2), process_group=comm, algorithm="native")
        return True

    assert all(run_ranks(body, 2))


def test_buffers_of_rank_0_are_everybodys() -> None:
    def body(comm: Communicator) -> list[Tensor]:
        torch.manual_seed(comm.rank)
        model = ringred.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), process_group=comm)
        for _ in range(3):
            model(torch.randn(8, 4) + comm.rank).sum().backward()
        model.eval()
        model(torch.zeros(1, 4))
        return [buffer.clone() for buffer in model.buffers()]

    results = run_ranks(body, 3)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    assert results[0][2].item() == 3, "batches tracked"


def test_what_would_go_unsynchronised_is_an_error() -> None:
    def body(comm: Communicator) -> list[str]:
        texts = []

        def refused(change: Callable[[nn.Module], object]) -> None:
            inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model = ringred.DistributedDataParallel(inner, process_group=comm)
            change(inner)
            with pytest.raises(RuntimeError) as raised:
                model(torch.ones(1, 4))
            texts.append(str(raised.value))

        refused(lambda m: setattr(m[1], "bias", nn.Parameter(torch.zeros(4))))
        refused(lambda m: m[0].weight.requires_grad_(False))
        refused(lambda m: m.append(nn.Linear(4, 4)))
        return texts

    for replaced, frozen, added in run_ranks(body, 2):
        assert "parameter '1.bias' was added, replaced or unfrozen" in replaced
        assert "parameter '0.weight' was frozen" in frozen
        assert "parameter '2.weight' was added" in added


def test_arguments_are_torchs_and_what_is_not_done_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="doesn't have any parameter that requires a gradient"):
        ringred.DistributedDataParallel(nn.ReLU())
    with pytest.raises(RuntimeError, match="'weight' is uninitialized"):
        ringred.DistributedDataParallel(nn.LazyLinear(3))
    with pytest.raises(UnsupportedTensor, match="'weight': expected it on the CPU, got meta"):
        ringred.DistributedDataParallel(nn.Linear(1, 1, device="meta"))
    refused: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"device_ids": [0]}, ValueError, r"only work with GPU modules, but got device_ids \[0\]"),
        ({"device_ids": [0, 1]}, ValueError, "single element"),
        ({"output_device": 0}, ValueError, "output_device 0"),
        ({"mixed_precision": object()}, ValueError, "torch's own needs an accelerator"),
        ({"lazy_bucket_allocation": True}, ValueError, "buckets lie in memory that ranks share"),
        ({"bucket_cap_mb": 0}, ValueError, "expected bucket_cap_mb > 0, got 0"),
        ({"bucket_cap_mb_list": [1, -1]}, ValueError, "expected bucket_cap_mb_list > 0, got -1"),
        ({"reduce_op": "max"}, ValueError, "expected reduce_op 'avg' or 'sum', got 'max'"),
        ({"desync_check_every": -1}, ValueError, "expected desync_check_every ≥ 0, got -1"),
        ({"deterministic": True, "algorithm": "ring"}, ringred.UnknownAlgorithm, "central, direct, one_shot"),
        ({"deterministic": True, "grid": (1, 1)}, ringred.UnknownAlgorithm, "does not go with grid"),
        ({"param_to_hook_all_reduce": nn.Parameter(torch.ones(1))}, ValueError, "set at the same time"),
        ({"bucket_plan": [["weight"]]}, ValueError, "every parameter of the model once, but not so 'bias'"),
        ({"bucket_plan": [["weight"], ["bias", "bias"]]}, ValueError, "not so 'bias'"),
        ({"bucket_plan": "/nowhere/plan.json"}, FileNotFoundError, "plan.json"),
        ({"bucket_cap": 25}, TypeError, "unexpected keyword argument 'bucket_cap'"),
    ]
    for arguments, kind, text in refused:
        with pytest.raises(kind, match=text):
            ringred.DistributedDataParallel(nn.Linear(1, 1), **arguments)
    with pytest.warns(FutureWarning, match="broadcast_buffers is ignored beside forward_sync_buffers"):
        ringred.DistributedDataParallel(nn.Linear(1, 1), broadcast_buffers=True, forward_sync_buffers=False)


def test_gradients_of_another_layout_than_at_construction_are_refused_by_name() -> None:
    def body(comm: Communicator) -> bool:
        for sparse in (False, True):
            embedding = nn.Embedding(5, 3, sparse=sparse)
            model = ringred.DistributedDataParallel(embedding, process_group=comm)
            embedding.sparse = not sparse
            wanted = "a gradient of sparse rows" if sparse else "a dense gradient"
            with pytest.raises(UnsupportedTensor, match=f"parameter 'weight': expected {wanted}"):
                model(torch.tensor([1, 2])).sum().backward()
        return True

    assert all(run_ranks(body, 2))


def test_state_dict_has_the_prefix_and_one_rank_trains_as_well() -> None:
    model = ringred.DistributedDataParallel(nn.Linear(2, 1))
    assert list(model.state_dict()) == ["module.weight", "module.bias"]
    model(torch.ones(1, 2)).sum().backward()
    assert torch.equal(model.module.weight.grad, torch.ones(1, 2))
    with pytest.raises(ringred.RingredError, match="no synchronised backward"):
        ringred.DistributedDataParallel(nn.Linear(2, 1)).overlap_report()
    model.comm.close()


@dataclass
class Outputs:
    loss: Tensor
    extra: list[Tensor]


def test_outputs_may_be_nested() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Outputs:
            return Outputs(self.a(x).sum(), [self.b(x)])

    def body(comm: Communicator) -> Tensor:
        model = ringred.DistributedDataParallel(Nested(), process_group=comm, find_unused_parameters=True)
        outputs = model(torch.full((1, 2), float(comm.rank)))
        (outputs.loss + outputs.extra[0].sum()).backward()
        return model.module.b.weight.grad

    assert all(torch.equal(gradient, torch.full((1, 2), 0.5)) for gradient in run_ranks(body, 2))


def test_the_trace_shows_reductions_under_backward_and_the_report_says_how_much(tmp_path: Path) -> None:
    def body(comm: Communicator) -> dict[str, object]:
        comm.start_trace(str(tmp_path / "trace.json"))
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(300, 300), nn.ReLU()) for _ in range(6)]
        model = ringred.DistributedDataParallel(nn.Sequential(*layers), process_group=comm, bucket_cap_mb=0.3)
        for _ in range(3):
            # A backward of some ms: ranks are threads, and all their threads share two cores.
            model(torch.randn(512, 300)).sum().backward()
        return model.overlap_report().as_dict()

    reports = run_ranks(body, 2)
    for rank, report in enumerate(reports):
        events = json.loads((tmp_path / f"trace.rank{rank}.json").read_text())["traceEvents"]
        backward = [e for e in events if e["name"] == "backward"]
        first = [e for e in events if e["name"].startswith("bucket 0 (")]
        assert len(backward) == len(first) == 3
        for under, over in zip(first, backward, strict=True):
            assert over["ts"] < under["ts"] < over["ts"] + over["dur"], "bucket 0 starts before backward ends"
        assert {"forward", "wait", "fold"} <= {e.get("cat") for e in events} | {e["name"] for e in events}
        buckets = report["buckets"]
        assert len(buckets) == 6
        assert all(b["ready_ms"] <= b["start_ms"] <= b["end_ms"] for b in buckets)
        assert report["exposed_ms"] == pytest.approx(sum(b["exposed_ms"] for b in buckets))
        assert report["hidden"] == pytest.approx(1 - report["exposed_ms"] / report["communication_ms"])
        # What ran after backward is what is exposed, no more and no less.
        last = buckets[-1]
        assert last["exposed_ms"] == pytest.approx(
            max(0.0, last["end_ms"] - max(report["backward_ms"], last["start_ms"])), abs=1e-6
        )


def test_two_forwards_before_a_backward_and_evaluation_in_between() -> None:
    """Broadcasting buffers must not spoil what autograd has saved."""

    def body(comm: Communicator) -> Tensor:
        torch.manual_seed(0)
        model = ringred.DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), process_group=comm)
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(comm.rank))
        first = model(inputs)
        with torch.no_grad():
            model(inputs)
        (first * model(inputs + 1)).mean().backward()
        # Ranks may evaluate unequal numbers of batches before they train on.
        model.eval()
        with torch.no_grad():
            for _ in range(2 + comm.rank):
                model(inputs)
        model.train()
        model(inputs).mean().backward()
        return model.module[1].weight.grad

    results = run_ranks(body, 2)
    assert torch.equal(*results)


def test_what_was_accumulated_without_synchronisation_is_reduced_though_unused_now() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(())) for _ in range(2))

        def forward(self, x: Tensor, which: str) -> Tensor:
            return getattr(self, which) * x

    def body(comm: Communicator, as_view: bool) -> tuple[float, float]:
        model = ringred.DistributedDataParallel(
            Either(), process_group=comm, find_unused_parameters=True, gradient_as_bucket_view=as_view
        )
        x = torch.tensor(float(comm.rank))
        with model.no_sync():
            model(x, "a").backward()
        model(x, "b").backward()
        model(x, "b").backward()  # without zero_grad: a keeps what it has, b accumulates
        return model.module.a.grad.item(), model.module.b.grad.item()

    for as_view in (False, True):
        assert run_ranks(lambda comm, as_view=as_view: body(comm, as_view), 2) == [(0.5, 1.0)] * 2


def test_an_output_that_the_loss_does_not_use() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [head(x) for head in self.heads]

    def body(comm: Communicator) -> list[Tensor | None]:
        model = ringred.DistributedDataParallel(Heads(), process_group=comm, find_unused_parameters=True)
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(1, 2))[comm.rank].sum().backward()  # each rank has a head of its own, none the third
        return [head.weight.grad for head in model.module.heads]

    for first, second, third in run_ranks(body, 2):
        assert torch.equal(first, torch.full((1, 2), 0.5))
        assert torch.equal(second, torch.full((1, 2), 0.5))
        assert third is None


def test_memory_format_is_part_of_the_model() -> None:
    def body(comm: Communicator) -> str:
        model = nn.Conv2d(2, 3, 2, bias=False)
        if comm.rank == 1:
            model = model.to(memory_format=torch.channels_last)
        with pytest.raises(ModelMismatch) as raised:
            ringred.DistributedDataParallel(model, process_group=comm)
        return str(raised.value)

    assert all("strides [8, 1, 4, 2]" in text for text in run_ranks(body, 2))


def test_a_backward_that_failed_is_said_and_training_goes_on() -> None:
    def body(comm: Communicator) -> Tensor:
        torch.manual_seed(0)
        model = ringred.DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), process_group=comm)
        output = model(torch.ones(1, 3))
        inner = model.module[0].weight.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output.sum().backward()
        inner.remove()
        with pytest.raises(RuntimeError, match="expected to have finished reduction"):
            model(torch.ones(1, 3))
        for _ in range(3):
            model.zero_grad()
            model(torch.full((1, 3), float(comm.rank))).sum().backward()
        return model.module[0].weight.grad

    results = run_ranks(body, 2)
    assert torch.equal(*results)
    assert results[0].abs().sum() > 0


def test_buffers_that_a_module_replaces_are_synchronised_too() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            return (x * self.weight + self.mean).sum()

    def body(comm: Communicator) -> Tensor:
        model = ringred.DistributedDataParallel(Average(), process_group=comm)
        for _ in range(3):
            model(torch.full((4, 2), float(comm.rank))).backward()
        model(torch.zeros(4, 2))
        return model.module.mean

    first, second = run_ranks(body, 2)
    assert torch.equal(first, second)


def test_a_wrapper_that_is_dropped_takes_its_hooks_along() -> None:
    def body(comm: Communicator) -> tuple[int, bool]:
        model = nn.Linear(4, 4, bias=False)
        wrappers = [weakref.ref(ringred.DistributedDataParallel(model, process_group=comm)) for _ in range(3)]
        gc.collect()
        last = ringred.DistributedDataParallel(model, process_group=comm)
        before = comm.counters.bytes_sent
        last(torch.ones(1, 4)).sum().backward()
        return comm.counters.bytes_sent - before, any(wrapper() is not None for wrapper in wrappers)

    assert run_ranks(body, 2) == [(64, False)] * 2


@pytest.mark.parametrize("as_views", [False, True])
@pytest.mark.parametrize("transport", ["local", "shm"])
def test_reductions_of_a_backward_that_was_given_up_do_not_disturb_the_next(transport: str, as_views: bool) -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:
            raise ArithmeticError("in the middle")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 300, bias=False), nn.Linear(300, 2000, bias=False)
            self.fails = False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(Raises.apply(hidden) if self.fails else hidden)

    def body(comm: Communicator) -> bool:
        module = Model()
        with torch.no_grad():
            module.first.weight.fill_(1.0)
        model = ringred.DistributedDataParallel(
            module, process_group=comm, bucket_cap_mb=1e-6, gradient_as_bucket_view=as_views
        )
        for turn in range(6):
            module.zero_grad()
            module.fails = turn % 3 == 2
            if turn == 3:
                with pytest.raises(RuntimeError, match="expected to have finished reduction"):
                    model(torch.zeros(1, 4))
            loss = model(torch.full((1, 4), float(turn + comm.rank))).sum()
            if module.fails:
                if comm.rank == 1:
                    time.sleep(0.05)  # the others have given up before this rank has begun
                with pytest.raises(ArithmeticError):
                    loss.backward()
                continue
            loss.backward()
            mean = sum(turn + rank for rank in range(comm.size)) / comm.size
            assert torch.equal(module.last.weight.grad, torch.full((2000, 300), 4 * mean)), turn
        return True

    assert all(run_ranks(body, 2, transport))


def test_the_constructor_is_torchs_argument_by_argument() -> None:
    """By name, place and default; torch's newest adds to the end."""

    def arguments(kind: type[nn.Module]) -> list[tuple[str, object, object]]:
        found = inspect.signature(kind.__init__).parameters.values()
        return [(parameter.name, parameter.default, parameter.kind) for parameter in found]

    theirs = arguments(nn.parallel.DistributedDataParallel)
    assert arguments(ringred.DistributedDataParallel)[: len(theirs)] == theirs
