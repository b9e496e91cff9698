"""ringred's DistributedDataParallel against torch's on Gloo: the same losses, gradients, parameters and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.procs.launching import launch

pytestmark = [pytest.mark.procs, pytest.mark.timeout(270)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_model_and_argument_trains_as_with_torch(ranks: int, tmp_path: Path) -> None:
    for whose in ("torch", "ringred"):
        arguments = ("ddp_differential.py", whose, str(tmp_path))
        ended = launch("torchrun", ranks, *arguments, limit=130, TORCH_CPP_LOG_LEVEL="ERROR")
        assert ended.status == 0, f"{whose}: {ended.said()}"
        assert not ended.left_behind
    found = json.loads(next(line for line in ended.output.splitlines() if "DIFFERENTIAL" in line).split(" ", 1)[1])
    assert len(found) > 200
    assert {case: what for case, what in found.items() if what != "equal"} == {}
