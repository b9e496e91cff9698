"""Ranks that are processes, started once by each way: the whole table, deterministic bits, every disagreement."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from typing import Any

import pytest
import torch

from ringred.testing import run_ranks
from tests import fake_tensors
from tests.procs.launching import WAYS, Ended, launch
from tests.procs.programs import deterministic

RANKS = (2, 3, 4, 5, 6)
# Over shared memory, where the player knows whole schedules, one way goes through the table on every number of ranks;
# of MPI and Gloo each has those that the other has not.
OF_WAY = {"mpi": (2, 3, 6), "torch_p2p": (2, 4, 5), "shm by mpirun": (2, 6), "shm by torchrun": RANKS}
TABLES = [(way, ranks) for way in WAYS for ranks in OF_WAY[way]]
DISAGREEMENTS = {"mpi": 21, "torch_p2p": 19, "shm by mpirun": 21, "shm by torchrun": 20}
# Tests of threads have deterministic bits over shared memory and Gloo on two to six ranks.
DIGESTS = [("mpi", ranks) for ranks in RANKS]
DIGESTS += [(way, ranks) for way in ("torch_p2p", "shm by torchrun") for ranks in (2, 6)]

pytestmark = [pytest.mark.procs, pytest.mark.timeout(500)]


@cache
def started(way: str) -> tuple[Ended, list[dict[str, Any]]]:
    """How the job of six ranks ended, and what its ranks said of each case."""
    cases = [f"table:{ranks}" for of, ranks in TABLES if of == way]
    cases += [f"digests:{ranks}" for of, ranks in DIGESTS if of == way]
    launcher, variables = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        ended = launch(launcher, max(RANKS), "started.py", folder, *cases, "disagreements:3", limit=460, **variables)
    return ended, [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]


def found(way: str, case: str, ranks: int) -> list[Any]:
    """What each rank found in a case."""
    ended, said = started(way)
    of_case = sorted((line for line in said if line["case"] == f"{case}:{ranks}"), key=lambda line: int(line["rank"]))
    failures = [line["failed"] for line in of_case if "failed" in line]
    assert not failures, failures[0]
    assert [line["rank"] for line in of_case] == list(range(ranks)), ended.output[-3000:]
    assert {line["transport"] for line in of_case} == {way.split()[0]}
    return [line["found"] for line in of_case]


def in_one_start(*cases: tuple[Any, ...]) -> list[Any]:
    """The cases, (way, ...), each on the worker that has started its way."""
    return [pytest.param(*case, marks=pytest.mark.xdist_group(case[0])) for case in cases]


EVERY_WAY = pytest.mark.parametrize("way", in_one_start(*((way,) for way in WAYS)))


@pytest.mark.parametrize(("way", "ranks"), in_one_start(*TABLES))
def test_the_whole_table(way: str, ranks: int) -> None:
    for of_rank in found(way, "table", ranks):
        assert of_rank["all_reduces"] == 68 * 5 * 9
        assert of_rank["others"] > 100
        assert of_rank["kit"] == (0 if way == "torch_p2p" else 26)


@EVERY_WAY
def test_every_disagreement_raises_on_every_rank(way: str) -> None:
    assert found(way, "disagreements", 3) == [DISAGREEMENTS[way]] * 3


def test_processes_on_a_device_that_is_none() -> None:
    ended = launch("torchrun", 3, "fake_device.py", limit=200)
    assert ended.status == 0, ended.output[-3000:]
    assert ended.output.count("all right: ") == 3
    assert ended.left_behind == []


@pytest.mark.skipif(not fake_tensors.available(), reason="this torch has no devices in Python")
def test_models_of_another_device_type_train_to_the_bits_of_the_cpu() -> None:
    ended = launch("torchrun", 3, "ddp_on_device.py", limit=200)
    assert ended.status == 0, ended.output[-3000:]
    assert "15 ways, the same bits" in ended.output
    assert ended.left_behind == []


@cache
def digest_of_threads(ranks: int) -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (digest,) = {digest for rank in run_ranks(deterministic.digests, ranks) for digest in rank}
    finally:
        torch.set_num_threads(threads)
    return digest


@pytest.mark.parametrize(("way", "ranks"), in_one_start(*DIGESTS))
def test_deterministic_bits_are_those_of_any_transport(way: str, ranks: int) -> None:
    """Caps of 1, 5 and 25 MiB, direct and one_shot."""
    of_ranks = found(way, "digests", ranks)
    assert {digest for of_rank in of_ranks for digest in of_rank} == {digest_of_threads(ranks)}
    assert {len(of_rank) for of_rank in of_ranks} == {5}


@EVERY_WAY
def test_the_job_ends_well_and_leaves_nothing_behind(way: str) -> None:
    ended, said = started(way)
    assert ended.status == 0, ended.output[-3000:]
    assert ended.left_behind == []
    of_cases = [ranks for of, ranks in (*TABLES, *DIGESTS) if of == way]
    assert len(said) == sum(of_cases) + 3, "each rank of each case, and of the disagreements"
