"""The entry point that torch calls when it is imported."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch.distributed as dist

from ringred.torch_backend.registration import register


def test_torch_finds_it_and_knows_the_backend() -> None:
    (found,) = (entry for entry in entry_points(group="torch.backends") if entry.name == "ringred")
    assert found.load() is register
    assert dist.Backend("ringred") == "ringred"
    assert dist.Backend.backend_capability["ringred"] == ["cpu", "cuda"]


def test_a_second_time_does_nothing() -> None:
    before = dist.Backend._plugins["RINGRED"]
    register()
    assert dist.Backend._plugins["RINGRED"] is before


def test_what_goes_wrong_is_a_warning_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any, **others: Any) -> None:
        raise RuntimeError("no more backends")

    monkeypatch.setattr(dist.Backend, "_plugins", {})
    monkeypatch.setattr(dist.Backend, "register_backend", refuses)
    with pytest.warns(UserWarning, match="backend='ringred' is not available: .*no more backends"):
        register()


@pytest.mark.parametrize("first", ["torch", "ringred", "ringred.torch_backend.registration"])
def test_whatever_is_imported_first(first: str) -> None:
    program = f"import {first}, torch, ringred; import torch.distributed as dist; print(dist.Backend('ringred'))"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", program], capture_output=True, text=True, check=False
        )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == "ringred"


def test_the_modules_that_users_name_are_there_with_the_package_alone() -> None:
    code = (
        "import ringred; print(ringred.hooks.PowerSGD, ringred.optim.ShardedOptimizer, ringred.reports.write_scalars)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
