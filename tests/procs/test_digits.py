"""The digits example: it learns as well under every hook, and goes on to the bit where a killed rank left it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.train_digits import HOOKS
from tests.procs.launching import launch

pytestmark = pytest.mark.procs

# Of the bytes of an all-reduce on two ranks.
SENT = {"fp16": 0.5, "bf16": 0.5, "int8": 0.255, "top_k": 0.02, "power_sgd": 0.038, "local_sgd": 0.381, "fused": 1.0}


@pytest.mark.timeout(300)  # eight trainings
def test_accuracy_is_kept_under_every_hook_and_bytes_are_saved(tmp_path: Path) -> None:
    ended = launch("torchrun", 2, "digits_hooks.py", str(tmp_path), limit=280)
    assert ended.status == 0, ended.output
    assert ended.left_behind == []
    found = {hook: json.loads((tmp_path / f"{hook}.json").read_text()) for hook in (None, *HOOKS)}
    plain = found.pop(None)
    assert plain["accuracy"] >= 0.97
    for hook, result in found.items():
        assert result["accuracy"] >= plain["accuracy"] - 0.01, hook
        assert result["bytes_sent"] == pytest.approx(SENT[hook] * plain["bytes_sent"], rel=0.03), hook


def test_a_killed_rank_costs_no_bit(tmp_path: Path) -> None:
    """Rank 1 dies in the second of four epochs, in which ranks then begin anew."""

    def final(dies_at: int, algorithm: str) -> dict[str, torch.Tensor]:
        path = tmp_path / f"died_at_{dies_at}.pt"
        ended = launch(
            *("torchrun", 2, "digits_killed.py", str(dies_at), "--epochs", "4", "--algorithm", algorithm),
            *("--deterministic", "--resume", "--checkpoint", str(path)),
            TORCHRUN_ARGS="--standalone --max-restarts=1",
        )
        assert ended.status == 0, ended.output[-3000:]
        assert ended.left_behind == []
        assert ("rank 1 dies" in ended.output) == (dies_at > 0)
        state = torch.load(path, weights_only=True)
        assert state["epoch"] == 4
        momentum = {str(at): kept["momentum_buffer"] for at, kept in state["optimizer"]["state"].items()}
        return {**state["model"], **momentum}

    undisturbed, resumed = final(-1, "direct"), final(45, "one_shot")
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
