"""What DistributedDataParallel refuses, and what it says of models and arguments that do not fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ringred
from ringred.communicator import Communicator
from ringred.errors import ModelMismatch, UnsupportedTensor
from ringred.testing import run_ranks
from tests.threads.ddp_models import Branches


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
    with pytest.raises(UnsupportedTensor, match="'weight': expected it on the CPU or a CUDA device, got meta"):
        ringred.DistributedDataParallel(nn.Linear(1, 1, device="meta"))
    refused: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"device_ids": [0]}, ValueError, r"only work with GPU modules on that device, but got device_ids \[0\]"),
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


def test_memory_format_is_part_of_the_model() -> None:
    def body(comm: Communicator) -> str:
        model = nn.Conv2d(2, 3, 2, bias=False)
        if comm.rank == 1:
            model = model.to(memory_format=torch.channels_last)
        with pytest.raises(ModelMismatch) as raised:
            ringred.DistributedDataParallel(model, process_group=comm)
        return str(raised.value)

    assert all("strides [8, 1, 4, 2]" in text for text in run_ranks(body, 2))


def test_the_constructor_is_torchs_argument_by_argument() -> None:
    """By name, place and default; torch's newest adds to the end."""

    def arguments(kind: type[nn.Module]) -> list[tuple[str, object, object]]:
        found = inspect.signature(kind.__init__).parameters.values()
        return [(parameter.name, parameter.default, parameter.kind) for parameter in found]

    theirs = arguments(nn.parallel.DistributedDataParallel)
    assert arguments(ringred.DistributedDataParallel)[: len(theirs)] == theirs
