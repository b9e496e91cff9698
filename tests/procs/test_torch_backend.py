"""torch.distributed on the backend "ringred": what people build on it comes to what it does on Gloo."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import fake_tensors
from tests.procs.launching import ROOT, launch, launch_plain
from tests.procs.programs.torch_features import FEATURES

pytestmark = [pytest.mark.procs, pytest.mark.timeout(240)]
OUR_HOOK = "ddp_with_our_hook"
OF_TORCH = [feature for feature in FEATURES if feature != OUR_HOOK]
ONE_START = pytest.mark.xdist_group("features")  # all of them are run by one start on each backend


def said(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@cache
def found_on(backend: str) -> list[dict[str, Any]]:
    """What each rank found, by feature."""
    wanted = OF_TORCH if backend == "gloo" else []  # all; our hook on Gloo has a start of its own, with ringred in it
    ended = launch("torchrun", 2, "torch_features.py", backend, *wanted, limit=200)
    assert ended.status == 0, ended.output[-3000:]
    assert ended.left_behind == []
    return [line["found"] for line in sorted(said(ended.output), key=lambda line: int(line["rank"]))]


@ONE_START
@pytest.mark.parametrize("feature", OF_TORCH)
def test_equals_gloo_to_the_bit_on_two_ranks(feature: str) -> None:
    ours, theirs = ([rank[feature] for rank in found_on(backend)] for backend in ("ringred", "gloo"))
    assert not any(isinstance(result, str) for result in theirs), theirs
    assert ours == theirs


@ONE_START
@pytest.mark.parametrize("backend", ["gloo", "ringred"])
def test_our_hook_makes_of_torchs_ddp_what_gloo_does(backend: str) -> None:
    found = found_on(backend) if backend == "ringred" else hook_on_gloo()
    assert [rank[OUR_HOOK] for rank in found] == [rank["ddp"] for rank in found_on("gloo")]


def hook_on_gloo() -> list[dict[str, Any]]:
    ended = launch("torchrun", 2, "torch_features.py", "gloo", OUR_HOOK)
    assert ended.status == 0, ended.output[-3000:]
    return [line["found"] for line in sorted(said(ended.output), key=lambda line: int(line["rank"]))]


ON_DEVICE = pytest.mark.skipif(not fake_tensors.available(), reason="this torch has no devices in Python")


@pytest.mark.parametrize(("ranks", "where"), [(2, []), (3, []), pytest.param(2, ["fake"], marks=ON_DEVICE)])
def test_every_form_of_every_collective(ranks: int, where: list[str]) -> None:
    ended = launch("torchrun", ranks, "torch_collectives.py", *where)
    assert ended.status == 0, ended.output[-3000:]
    assert ended.output.count("every check passed") == ranks
    assert ended.left_behind == []


def test_a_killed_rank_is_named_and_training_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    def final(folder: str, dies_at: int) -> tuple[float, list[dict[str, Any]]]:
        (tmp_path / folder).mkdir()
        ended = launch(
            "torchrun",
            2,
            "torch_restarts.py",
            str(tmp_path / folder),
            str(dies_at),
            TORCHRUN_ARGS="--standalone --max-restarts=1",
        )
        assert ended.status == 0, ended.output[-3000:]
        assert "egmentation" not in ended.output
        assert ended.left_behind == []
        lines = said(ended.output)
        results = {line["done"] for line in lines if "done" in line}
        assert len(results) == 1
        return results.pop(), lines

    undisturbed, _ = final("undisturbed", -1)
    resumed, lines = final("killed", 4)
    assert resumed == undisturbed
    assert sorted(line["begins"] for line in lines if line["life"] == 1 and "begins" in line) == [4, 4]
    died = next(line["dies"] for line in lines if "dies" in line)
    for line in lines:
        if "error" in line:  # torchrun may have ended it before it could speak
            assert "rank 1" in line["error"]
            assert line["raised"] - died < 1.0


@cache
def losses(example: str, backend: str) -> list[str]:
    path = ROOT / "examples" / "gpt" / f"{example}.py"
    ended = launch("torchrun", 2, path, "--steps", "20", "--backend", backend)
    assert ended.status == 0, ended.output[-3000:]
    assert ended.left_behind == []
    return [line for line in ended.output.splitlines() if line.startswith("step ")]


@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("framework", ["fsdp2", "lightning_ddp", "accelerate_ddp"])
def test_the_examples_train_alike(framework: str) -> None:
    """FSDP2, Lightning and Accelerate come to the losses of torch's own DDP on Gloo."""
    found = losses(framework, "ringred")
    assert [line.split(":")[0] for line in found] == ["step 1", "step 20"]
    assert found == losses("torch_ddp", "gloo")


def test_beside_another_backend() -> None:
    ended = launch("torchrun", 2, "torch_mixed.py")
    assert ended.status == 0, ended.output[-3000:]
    assert ended.output.count("as this version of torch lets us") == 2
    assert ended.left_behind == []


def test_a_part_of_torchs_own_suite() -> None:
    """All of it, and more ranks, by `make torch-suite`."""
    tests = ["test_send_recv_any_source", "test_Backend_enum_class", "test_all_gather_object_subgroup"]
    tests += ["test_monitored_barrier_gloo_subgroup", "test_all_reduce_coalesced_sum", "test_DistributedDataParallel"]
    ended = launch_plain(ROOT / "tests" / "torch_suite" / "compare.py", "--ranks", "2", "--tests", *tests)
    assert ended.status == 0, ended.output[-3000:]
    theirs, ours = (
        next(line.split(": ")[1] for line in ended.output.splitlines() if line.startswith(f"2 ranks, {backend}"))
        for backend in ("gloo", "ringred")
    )
    assert ours == theirs
    assert int(ours.split()[0]) >= 4
    assert ended.left_behind == []


def test_a_group_is_taken_as_it_is_however_it_was_made() -> None:
    """Each init_method, a store and a sub-group, among variables of launchers that mean another job."""
    ended = launch_plain("torch_groups.py")
    assert ended.status == 0, ended.output[-3000:]
    assert ended.output.count(": right\n") == (3 + 2) * 8 * 3
    assert ended.left_behind == []


def test_ranks_that_disagree_raise_and_the_process_lives_on() -> None:
    ended = launch("torchrun", 2, "torch_faults.py", RINGRED_TIMEOUT="20")
    assert ended.status == 0, ended.output[-3000:]
    assert ended.output.count("every fault was told") == 2, ended.output[-3000:]
    assert ended.left_behind == []
