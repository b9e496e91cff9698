"""ringred's DistributedDataParallel against torch's on Gloo: the same losses, gradients, parameters and refusals."""

from __future__ import annotations

import json

import pytest

from tests.procs.launching import launch

pytestmark = [pytest.mark.procs, pytest.mark.timeout(270)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_model_and_argument_trains_as_with_torch(ranks: int) -> None:
    ended = launch("torchrun", ranks, "ddp_differential.py", limit=240, TORCH_CPP_LOG_LEVEL="ERROR")
    assert ended.status == 0, ended.said()
    found = json.loads(next(line for line in ended.output.splitlines() if "DIFFERENTIAL" in line).split(" ", 1)[1])
    assert len(found) > 200
    assert {case: what for case, what in found.items() if what != "equal"} == {}
    assert not ended.left_behind
