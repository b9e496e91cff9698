"""Real processes under real launchers: the whole table, every error, and every way to die."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.procs.launching import ROOT, WAYS, launch, launch_plain, mistaken

pytestmark = [pytest.mark.procs, pytest.mark.timeout(240)]

EXAMPLE = ROOT / "examples" / "train_digits.py"


@pytest.mark.parametrize("how", ["killed", "raises", "exits"])
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_dies_ends_the_job(way: str, how: str) -> None:
    launcher, variables = WAYS[way]
    ended = launch(launcher, 3, "dies.py", how, limit=60, RINGRED_TIMEOUT="20", **variables)
    assert ended.status != 0, ended.output
    assert ended.output.count("is at work") == 3, ended.output
    died = float(next(line.split()[-1] for line in ended.output.splitlines() if "dies at" in line))
    assert ended.at - died < (5 if launcher == "mpirun" else 10), ended.output
    assert ended.left_behind == []
    # The launcher may end survivors before they can speak; those that spoke must name rank 1.
    assert mistaken(ended.output) == []
    if how == "raises":
        assert "a bug of the user's" in ended.output


@pytest.mark.parametrize("memory", [[], ["device"]], ids=["host", "device"])
def test_survivors_of_a_kill_raise_within_a_second_and_nothing_stays(memory: list[str]) -> None:
    ended = launch_plain("killed.py", "5", "1", *memory)
    assert ended.status == 0, ended.output[-3000:]
    assert float(ended.output.split("raised within ")[1].split()[0]) < 1.0
    assert ended.left_behind == []


def test_ddp_equals_torchs_to_the_bit_on_two_ranks() -> None:
    ended = launch("torchrun", 2, "ddp_pair.py")
    assert ended.status == 0, ended.output[-3000:]
    assert "equal to the bit: " in ended.output


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", 1), ("mpirun", 2), ("torchrun", 4)])
def test_the_example_learns(launcher: str, ranks: int, tmp_path: Path) -> None:
    found = tmp_path / "digits.json"
    ended = launch(launcher, ranks, EXAMPLE, "--algorithm", "torus", "--json", str(found))
    assert ended.status == 0, ended.output[-3000:]
    result = json.loads(found.read_text())
    assert result["ranks"] == ranks
    assert result["accuracy"] >= 0.97
    assert len(result["overlap"]["buckets"]) >= 4
    assert ended.left_behind == []


def test_the_example_resumes_from_its_checkpoint_and_traces(tmp_path: Path) -> None:
    arguments = ("--algorithm", "ring", "--checkpoint", str(tmp_path / "digits.pt"))
    first = launch("mpirun", 2, EXAMPLE, *arguments, "--epochs", "2")
    assert first.status == 0, first.output[-3000:]
    found, trace = tmp_path / "digits.json", tmp_path / "trace.json"
    more = ("--resume", "--epochs", "4", "--json", str(found), "--bar")
    second = launch("mpirun", 2, EXAMPLE, *arguments, *more, RINGRED_TRACE=str(trace))
    assert second.status == 0, second.output[-3000:]
    assert "0/2" in second.output, "two of four epochs are left"
    assert [path.name for path in tmp_path.glob("*.pt*")] == ["digits.pt"]
    for rank in range(2):
        events = json.loads((tmp_path / f"trace.rank{rank}.json").read_text())["traceEvents"]
        backward = [event for event in events if event["name"] == "backward"]
        buckets = [event for event in events if event["name"] == "bucket 0 (ring)"]
        assert len(backward) == len(buckets) == 2 * 29
        early = sum(b["ts"] < over["ts"] + over["dur"] for b, over in zip(buckets, backward, strict=True))
        # Both cores compute, and a step has 2 ms of backward: the kernel may let the progress thread wait that long.
        assert early > 0.5 * len(backward), "the first bucket's reduction starts before backward ends"


def test_the_scaling_benchmark_measures_and_simulates(tmp_path: Path) -> None:
    found, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    small = ("--short", "--width", "64", "--rounds", "2", "--epochs", "2", "--simulate-ranks", "16")
    named = ("--algorithms", "ring", "central", "native", "--json", str(found), "--plot", str(picture))
    ended = launch("mpirun", 3, ROOT / "benchmarks" / "scaling.py", *small, *named)
    assert ended.status == 0, ended.output[-3000:]
    result = json.loads(found.read_text())
    assert {"machine", "versions", "command", "baseline", "model"} <= result.keys()
    rows = {row["algorithm"]: row for row in result["rows"]}
    nbytes = result["gradient_bytes"]
    # 3 ranks: ring sends 2·2/3 of the data, the centre of `central` twice the data, and MPI's own is not counted.
    assert rows["ring"]["bytes_sent_by_the_busiest"] == pytest.approx(4 / 3 * nbytes, rel=1e-3)
    assert rows["central"]["bytes_sent_by_the_busiest"] == pytest.approx(2 * nbytes, rel=1e-3)
    assert rows["native"]["bytes_sent_by_the_busiest"] is None
    for row in rows.values():
        assert row["efficiency"] == pytest.approx(result["baseline_step_ms"] / row["step_ms"])
        assert row["speedup"] == pytest.approx(3 * row["efficiency"])
    simulated = {(row["algorithm"], row["ranks"]): row["efficiency"] for row in result["simulated"]}
    assert max(ranks for _, ranks in simulated) == 16
    assert simulated["ring", 1] == 1.0
    assert simulated["central", 16] < simulated["ring", 16] < simulated["torus", 16] < 1
    assert picture.stat().st_size > 10_000
    assert "3 ranks share" in ended.output or result["machine"]["usable_cores"] >= 3
    assert "Baseline: one rank alone" in ended.output
    assert "Simulated, not measured" in ended.output


def test_the_comparison_checks_every_system_and_names_the_absent(tmp_path: Path) -> None:
    found, picture = tmp_path / "found.json", tmp_path / "found.png"
    small = ("--starts", "1", "--rounds", "1", "--sizes", "4,64K", "--json", str(found), "--plot", str(picture))
    systems = "ringred,ringred-mpi,gloo,mpi,mpi@/no/such/python"
    ended = launch_plain(ROOT / "benchmarks" / "all_reduce.py", "--systems", systems, *small)
    assert ended.status == 0, ended.output[-3000:]
    result = json.loads(found.read_text())
    assert {"machine", "versions", "command", "limit_GBps", "rows"} <= result.keys()
    assert result["absent"] == {"mpi@/no/such/python": "no /no/such/python"}
    assert "absent: mpi@/no/such/python" in ended.output
    rows = {(row["system"].split()[0], row["memory"], row["bytes"]): row for row in result["rows"]}
    kinds = {("ringred", "window"), ("ringred", "tensor"), ("ringred-mpi", "window"), ("ringred-mpi", "tensor")}
    kinds |= {("gloo", "tensor"), ("Open", "tensor"), ("limit", "tensor")}
    assert rows.keys() == {(*kind, nbytes) for kind in kinds for nbytes in (4, 65536)}
    for row in rows.values():
        assert row["wrong"] == 0
        assert 0 < row["time_us"] <= row["whole_us"]
        assert row["busbw_GBps"] == pytest.approx(row["bytes"] / row["time_us"] / 1e3)
    assert picture.stat().st_size > 10_000
    assert ended.left_behind == []


def test_a_step_is_compared_with_torchs_ddp(tmp_path: Path) -> None:
    found = tmp_path / "step.json"
    small = ("--models", "mlp", "--mlp-width", "64", "--starts", "1", "--rounds", "3", "--json", str(found))
    ended = launch_plain(ROOT / "benchmarks" / "ddp_step.py", *small)
    assert ended.status == 0, ended.output[-3000:]
    rows = {row["system"]: row for row in json.loads(found.read_text())["rows"]}
    assert list(rows) == ["local", "torch", "torch_on_ringred", "ringred"]
    assert all(row["step_ms"] > 0 and row["peak_MiB"] > row["share_MiB"] > 0 for row in rows.values())
    assert rows["local"]["overhead"] == 0
    assert ended.left_behind == []


def test_the_check_of_a_gpu_works_where_there_is_none(tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "gpu_check.py"
    without = launch_plain(program, "--out", str(tmp_path / "without"))
    assert without.status == 3
    assert "sees no CUDA device on this machine: nothing was checked" in without.output
    assert not (tmp_path / "without").exists()
    steps = ("driver", "collectives-2", "killed")
    fake = launch_plain(program, "--fake", "--out", str(tmp_path), "--only", *steps)
    assert fake.status == 0, fake.output
    assert fake.output.count(" held") == 4
    assert json.loads((tmp_path / "collectives-2.json").read_text())["found"]["checked"] > 500
    assert fake.left_behind == []


def test_no_thread_is_left_for_the_interpreter_to_kill() -> None:
    ended = launch("torchrun", 2, "ends.py")
    assert ended.status == 0, ended.output[-3000:]
    assert ended.output.count("threads left: []") == 2, ended.output
    assert ended.left_behind == []


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_costs_that_were_measured_are_those_of_the_next_start(launcher: str, tmp_path: Path) -> None:
    kept = tmp_path / "tuning.json"
    first = launch(launcher, 2, "tuned.py", RINGRED_TUNING=str(kept))
    assert first.status == 0, first.output
    (entry,) = json.loads(kept.read_text()).items()
    costs = {kind: [1.23e-07 + place * 1e-09 for place in range(5)] for kind in entry[1]}  # each as long as can be
    kept.write_text(json.dumps({entry[0]: costs}))
    second = launch(launcher, 2, "tuned.py", RINGRED_TUNING=str(kept))
    assert second.status == 0, second.output
    lines = [line.partition(": ")[2] for line in second.output.splitlines() if line.startswith("rank ")]
    assert len(lines) == 2
    for line in lines:
        assert json.loads(line) == {kind: pytest.approx(values, rel=0.01) for kind, values in costs.items()}
    assert first.left_behind == second.left_behind == []
