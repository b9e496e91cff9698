"""What DDP says of itself: stragglers, overlap and a forecast for other caps."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ringred.buckets import Entry
from ringred.communicator import Communicator
from ringred.data_parallel.overlap import BackwardTimes, forecast, report
from ringred.data_parallel.reports import Monitor, write_scalars
from ringred.data_parallel.stragglers import straggler_report
from ringred.errors import RingredError
from ringred.testing import run_ranks
from tests.threads.wrapping import MODEL, backward, wrapped

LATE = 0.25  # seconds: several times what a machine with ten threads a core keeps a rank waiting, on the average


def test_the_straggler_is_named_on_every_rank() -> None:
    """By arrivals that are given: none of the numbers is a matter of how busy the machine is."""

    def body(comm: Communicator) -> tuple[dict[str, Any], str]:
        late = 0.051 if comm.rank == comm.size - 1 else 0.001
        report = straggler_report(comm, [1.0] * (3 - comm.rank) + [late] * 10)  # older ones that not all ranks have
        return report.as_dict(), str(report)

    results = run_ranks(body, 3)
    assert len({json.dumps(report) for report, _ in results}) == 1, "all ranks say the same"
    report, text = results[0]
    assert report["straggler"] == 2
    assert report["iterations"] == 11
    assert [rank["last"] for rank in report["ranks"]] == [1, 0, 10]
    assert [rank["caused"] for rank in report["ranks"]] == pytest.approx([0.0, 0.0, 1.0])
    assert [rank["busy_ms"] for rank in report["ranks"]] == pytest.approx([1.0, 1.0, 51.0])
    assert [rank["waits_ms"] for rank in report["ranks"]] == pytest.approx([500 / 11, 500 / 11, 0.0])
    assert report["waiting"] > 0.2
    assert "rank 2 is the straggler" in text


def test_the_last_rank_is_named_for_its_time_in_forward() -> None:
    class Slow(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.inner, self.norm, self.seconds = copy.deepcopy(MODEL), nn.BatchNorm1d(30), seconds

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(self.seconds)
            return self.inner(self.norm(x))

    def body(comm: Communicator) -> tuple[int | None, int]:
        # BatchNorm's buffers come from rank 0 in each forward, and wait there too.
        model = wrapped(comm, Slow(LATE if comm.rank == comm.size - 1 else 0.0))
        for step in range(6):
            backward(model, comm.rank, 8, step)
        report = model.straggler_report()
        return report.straggler, report.iterations

    assert run_ranks(body, 3) == [(2, 5)] * 3


def test_rank_0_is_named_though_the_others_wait_for_it_in_forward() -> None:
    def body(comm: Communicator) -> int | None:
        model = wrapped(comm, nn.Sequential(nn.BatchNorm1d(30), MODEL))
        for step in range(6):
            if comm.rank == 0:
                time.sleep(LATE)  # before forward, in which the others wait for its buffers
            backward(model, comm.rank, 8, step)
        return model.straggler_report().straggler

    assert run_ranks(body, 3) == [0, 0, 0]


def test_a_straggler_report_does_not_mix_iterations_of_join() -> None:
    def body(comm: Communicator) -> int:
        model = wrapped(comm)
        with model.join():
            for step in range(2 + comm.rank):
                backward(model, comm.rank, 8, step)
        for step in range(3):
            backward(model, comm.rank, 8, step)
        return model.straggler_report().iterations

    assert run_ranks(body, 2) == [2, 2]


def test_a_straggler_report_of_nothing() -> None:
    def body(comm: Communicator) -> str:
        report = wrapped(comm).straggler_report()
        assert report.straggler is None
        return str(report)

    assert all("nothing is known of stragglers" in text for text in run_ranks(body, 2))


def test_the_forecast_is_what_a_simulation_by_hand_gives() -> None:
    ms = 1_000_000
    times = BackwardTimes(
        began_ns=0,
        ended_ns=10 * ms,
        ready_ns=[10 * ms, 6 * ms, 2 * ms, 0],  # the last one is delayed
        full_ns=[2 * ms, 10 * ms],
        started_ns=[2 * ms, 10 * ms],
        done_ns=[4 * ms, 14 * ms],
        nbytes=[1 << 20, 2 << 20],
        parameters=[1, 2],
        algorithms=["direct", "direct"],
    )
    entries = [Entry(1 << 20, "f")] * 4
    caps, slowness = forecast(times, entries, set(), lambda nbytes: nbytes / (1 << 20) / 1000)
    assert slowness == pytest.approx(2.0)  # 6 ms where the model says 3
    exposed = {cap.cap_mb: (cap.buckets, cap.exposed_ms) for cap in caps}
    assert exposed[1] == (3, pytest.approx(2.0))  # each 2 ms, of which the last begins at the end
    assert exposed[2] == (2, pytest.approx(2.0))
    assert exposed[5] == (1, pytest.approx(6.0))
    found = report(times, caps, slowness)
    assert found.exposed_ms == pytest.approx(4.0)
    assert found.best_cap == caps[0]
    assert "bucket_cap_mb=1 (3 buckets) is expected to leave 2.00 ms after backward" in str(found)
    late = forecast(times, entries, set(), lambda nbytes: 1e-4)
    assert late == ([], pytest.approx(30.0))
    assert "reductions took 30 times what the cost model says: they waited" in str(report(times, *late))
    times.done_ns = [4 * ms, 10 * ms + 1]
    assert str(report(times, caps, slowness)).endswith("100% hidden")


def test_reports_as_json_and_scalars(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def body(comm: Communicator) -> None:
        model = wrapped(comm, bucket_cap_mb=0.004)
        for step in range(4):
            backward(model, comm.rank, 8, step)
        overlap, stragglers = model.overlap_report(), model.straggler_report()
        assert json.loads(json.dumps(overlap.as_dict()))["hidden"] == overlap.hidden
        assert len(overlap.buckets) == len(model.bucket_plan())
        assert overlap.slowness > 0
        assert f"{overlap.hidden:.0%} hidden" in str(overlap)
        if comm.rank == 0:
            with tensorboard.SummaryWriter(str(tmp_path)) as writer:
                write_scalars(writer, 4, overlap, stragglers)

    run_ranks(body, 2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"overlap/exposed_ms", "overlap/hidden", "straggler/waiting", "straggler/rank1/caused"} <= set(tags)
    assert [event.step for event in events.Scalars("overlap/hidden")] == [4]


class Run:
    """A run of Weights & Biases, as far as a monitor knows it."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def test_a_monitor_writes_once_in_so_many_steps() -> None:
    runs = [Run(), Run()]

    def body(comm: Communicator) -> list[dict[str, float] | None]:
        model = wrapped(comm)
        monitor = Monitor(model, runs[0] if comm.rank == 0 else None, every=2)
        found = []
        for step in range(5):
            backward(model, comm.rank, 8, step)
            found.append(monitor.step())
        return found

    for rank, found in enumerate(run_ranks(body, 2)):
        assert [values is not None for values in found] == [False, True, False, True, False], rank
    assert [step for step, _ in runs[0].logged] == [2, 4]
    values = runs[0].logged[1][1]
    assert {"step/ms", "traffic/messages_sent", "overlap/hidden", "straggler/rank1/caused"} <= values.keys()
    gradients = 4 * sum(parameter.numel() for parameter in MODEL.parameters())
    assert values["traffic/bytes_sent"] == pytest.approx(gradients, rel=0.2)


def test_a_monitor_begins_anew_with_another_communicator_and_asks_no_stragglers_then() -> None:
    class Model:
        recovery = object()

        def __init__(self, comm: Communicator) -> None:
            self.comm = comm

        def overlap_report(self) -> Any:
            raise RingredError("no synchronised backward was made yet")

    def body(comm: Communicator) -> list[dict[str, float] | None]:
        model, found = Model(comm), []
        monitor = Monitor(model, None, every=2)
        for step in range(6):
            if step == 3:
                model.comm = comm.duplicate()
            model.comm.all_reduce(torch.ones(100), algorithm="one_shot")
            found.append(monitor.step(step))
        return found

    for found in run_ranks(body, 2):
        sent = [None if values is None else values.get("traffic/bytes_sent") for values in found]
        assert sent == [None, 400.0, None, None, None, 400.0]
        assert found[3] == {}


def test_a_monitor_takes_no_log_that_is_none() -> None:
    with pytest.raises(TypeError, match="expected a log with add_scalar or log, or a function, got int"):
        write_scalars(3, 1)
    with pytest.raises(TypeError, match="got RootLogger"):
        write_scalars(logging.getLogger(), 1)
    with pytest.raises(ValueError, match="expected every ≥ 1, got 0"):
        Monitor(None, None, every=0)  # type: ignore[arg-type]
