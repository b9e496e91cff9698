"""The laboratory's command, what it leaves and refuses, and what its ranks replay; its models: test_lab.py."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab import hosts, record, rows, running, step_ranks


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """benchmarks/lab.py, whose name is also that of the folder beside it."""
    path = Path(__file__).parents[2] / "benchmarks" / "lab.py"
    found = importlib.util.spec_from_file_location("lab_command", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_why_there_is_no_laboratory_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    assert "needs root" in str(hosts.unavailable())
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts.shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    assert hosts.unavailable() == "the laboratory needs tc: install iproute2 and util-linux"

    def refused(*words: str) -> None:
        raise RuntimeError(f"{' '.join(words[:3])}: Operation not permitted")

    monkeypatch.setattr(hosts.shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(hosts, "_run", refused)
    monkeypatch.setattr(hosts.subprocess, "run", lambda *_, **__: None)
    assert hosts.unavailable() == "the laboratory cannot make its networks here: ip netns add: Operation not permitted"


def test_who_is_not_root_is_told_so_by_clean(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["lab.py", "clean"])
    assert command.main() == 3
    assert "needs root" in capsys.readouterr().err


def test_a_name_is_alive_with_the_process_that_gave_it_and_no_other_of_its_number() -> None:
    mine = hosts.mine()
    assert hosts._lives(f"{mine}-0")
    assert not hosts._lives(f"{mine}1-0"), "one of this number, started at another time"
    assert not hosts._lives("ringred-lab-4194305.7-switch"), "there is no process of this number"


def test_a_report_leaves_out_what_was_measured_and_not_predicted(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"hosts": 4, "nbytes": 8, "way": "ring", "seconds": 1.0}
    result = {"name": "short", "question": "?", "networks": ["4 hosts"], "by": "torch", "rows": [row]}
    (tmp_path / "short.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["lab.py", "--out", str(tmp_path), "report"])
    assert command.main() == 2
    told = capsys.readouterr().err
    assert "short is measured, not predicted" in told
    assert "nothing was run yet" in told
    known = {"case": "8 B", "of_line": 0.5, "predicted": 2.0, "error": 1.0, "fitted": False}
    result |= {"name": "short+mine", "rows": [row | known], "date": "2026-11-30", "machine": "one of 2 cores"}
    (tmp_path / "short+mine.json").write_text(json.dumps(result))
    (tmp_path / "published.json").write_text(json.dumps({"heads": ["work"], "rows": [["Goyal"]]}))
    monkeypatch.setattr(command.scale, "RANKS", (4, 6))
    monkeypatch.setattr(sys, "argv", ["lab.py", "--out", str(tmp_path), "scale"])
    assert command.main() == 0
    assert json.loads((tmp_path / "scale.json").read_text())["heads"] == ["model", "by", "4 ranks", "6 ranks"]
    monkeypatch.setattr(sys, "argv", ["lab.py", "--out", str(tmp_path), "report"])
    assert command.main() == 0
    page = (tmp_path / "report.html").read_text()
    assert all(text in page for text in ("one of 2 cores", "Goyal", "+100", "2026-11-30", "6 ranks"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--short", "racks"], "expected neither names nor --profile"),
        (["racks", "--profile", "my.json"], "expected experiments with training steps, got racks"),
    ],
)
def test_what_run_is_given_in_vain_is_refused(
    command: ModuleType,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lab.py", "run", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert says in capsys.readouterr().err


def test_a_table_says_how_many_times_slower_models_were() -> None:
    result = {"networks": ["4 hosts of 500 Mbit/s"], "by": "torch"}
    assert rows.setting(result | {"rows": [{}]}) == "4 hosts of 500 Mbit/s; torch"
    slow = rows.setting(result | {"rows": [{"dilation": 20.0}]})
    assert slow == "4 hosts of 500 Mbit/s; torch; models 20 times slower than their profile"
    several = rows.setting(result | {"rows": [{"dilation": times} for times in (80.0, 2.5, 5.0)]})
    assert several.endswith("models 2.5 to 80 times slower than their profile")


def test_a_replayed_step_takes_as_long_as_was_recorded_with_its_core_busy() -> None:
    recorded = record.record("mlp", record.load("mlp"))
    model = step_ranks.Replayed(recorded, 1.0, busy=True)
    began, used = time.perf_counter(), time.process_time()
    model(torch.ones(1, requires_grad=True)).backward()
    assert time.perf_counter() - began >= recorded.seconds
    assert time.process_time() - used > 0.2 * recorded.seconds, "asleep it uses less than a tenth"
    assert [tuple(weight.grad.shape) for weight in model.weights] == [(layer.elements,) for layer in recorded.layers]


def test_a_bar_shows_what_the_ranks_have_done_last() -> None:
    with tqdm(total=1.0, disable=True) as bar:
        running._show(bar, 'no word of it yet {"way": "ring"}')
        assert bar.n == 0
        running._show(bar, '{"done": 0.25}\n{"way": "ring"}\n{"done": 0.5}\n{"way"')
        assert bar.n == 0.5


def test_predictions_are_judged_by_kind_without_those_that_are_no_news() -> None:
    def row(case: str, way: str, error: float | None, **more: object) -> dict[str, object]:
        known = {"hosts": 4, "case": case, "way": way, "error": error, "predicted": 1.0, "fitted": False}
        return known | more

    reduced = [
        row("8 B", "ring", 0.5, nbytes=8),
        row("8 B", "auto", 0.4, nbytes=8),  # the ring, again
        row("8 B", "tree", -0.1, nbytes=8, fitted=True, predicted=2.0),
        row("8 B", "gloo", None, nbytes=8, predicted=None),
        row("1048576 B", "auto", -0.2, nbytes=1 << 20),
    ]
    steps = [row("vgg16", "alone", 0.3), row("vgg16", "ring", 0.01), row("vgg16", "server:sync", -0.6)]
    results = [{"name": name, "networks": [], "rows": rows} for name, rows in (("a", reduced), ("b", steps))]
    _, told = rows.precision(results)
    assert told == [
        ("all", "4", "35.0%", "60.0%"),
        ("all-reduces up to 64 KiB", "1", "50.0%", "50.0%"),
        ("longer all-reduces", "1", "20.0%", "20.0%"),
        ("steps by collectives", "1", "1.0%", "1.0%"),
        ("steps on parameter servers", "1", "60.0%", "60.0%"),
    ]
    _, bad = rows.worst(results, 2)
    assert [line[:3] for line in bad] == [("b", "vgg16 server:sync", "-60"), ("a", "8 B ring", "+50")]


def test_a_step_that_is_no_longer_than_alone_hides_its_reductions() -> None:
    step = {"hosts": 2, "case": "vgg16", "way": "ring", "error": 0.0, "predicted": 1.0, "fitted": False}
    step |= {"seconds": 4.0, "sent": 0.0, "received": 0.0, "late": 0.0, "low": 3.5, "high": 4.5}
    shown = [
        dict(zip(*(rows.cells({"networks": [""], "rows": [step | more]})[0], line), strict=True))
        for more in ({"efficiency": 0.75, "reducing": 2.0}, {"efficiency": 1.0, "reducing": 2.0})
        for line in rows.cells({"networks": [""], "rows": [step | more]})[1]
    ]
    assert [line["hidden"] for line in shown] == ["50%", "100%"]
    assert shown[0]["from - to"] == "3500.00 - 4500.00"


def test_each_kind_of_wrong_prediction_has_its_reason() -> None:
    def why(way: str, nbytes: int | None = None, name: str = "reduce", network: str = "4 hosts of 500 Mbit/s") -> str:
        row = {"way": way} if nbytes is None else {"way": way, "nbytes": nbytes}
        return rows.reason({"name": name, "networks": [network]}, row)

    assert "beside encrypting" in why("server:k_sync:3")
    assert "a call's own cost" in why("central", 1 << 10)
    assert "share cores" in why("ring", 64 << 10, network="4 hosts of 500 Mbit/s with 2 ranks each")
    assert why("ring", 1 << 20, name="bbr") == "the simulator knows no BBR"
    assert "come to terms" in why("tree", 4 << 20)
    assert why("ring", 4 << 20) == "not found"
