"""ringred's DistributedDataParallel against torch's on Gloo: the same losses, gradients, parameters and refusals."""

from __future__ import annotations

import json

import pytest
import torch

from ringred.testing import run_ranks
from tests.procs.launching import WAYS, launch
from tests.procs.programs import deterministic

pytestmark = pytest.mark.procs


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_model_and_argument_trains_as_with_torch(ranks: int) -> None:
    ended = launch("torchrun", ranks, "ddp_differential.py")
    assert ended.status == 0, ended.output
    found = json.loads(next(line for line in ended.output.splitlines() if "DIFFERENTIAL" in line).split(" ", 1)[1])
    assert len(found) > 200
    assert {case: what for case, what in found.items() if what != "equal"} == {}
    assert not ended.left_behind


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6])
def test_deterministic_bits_are_those_of_any_transport(ranks: int) -> None:
    """Caps of 1, 5 and 25 MiB, direct and one_shot, over MPI and threads' memory; on two and six ranks also over
    shared memory and Gloo, which tests of threads have on two to six."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = {digest for rank in run_ranks(deterministic.digests, ranks) for digest in rank}
    finally:
        torch.set_num_threads(threads)
    assert len(expected) == 1
    for way in ("mpi", "torch_p2p", "shm by torchrun") if ranks in (2, 6) else ("mpi",):
        launcher, variables = WAYS[way]
        ended = launch(launcher, ranks, "deterministic.py", **variables)
        assert ended.status == 0, ended.output
        lines = [line.split()[1:] for line in ended.output.splitlines() if line.startswith("DIGESTS")]
        assert {line[1] for line in lines} == {way.split()[0]}
        assert sorted(int(line[0]) for line in lines) == list(range(ranks))
        assert {digest for line in lines for digest in line[2:]} == expected
