"""The command line, whose options are promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ringred.collectives.registry import COLLECTIVES, algorithms, groups
from ringred.testing.command import doctor
from ringred.testing.command.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_verify_counts_what_it_proved(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "verify", "--max-ranks", "6")
    assert status == 0
    last = out.strip().splitlines()[-1]
    every = [entry for name in COLLECTIVES for entry in algorithms(name).values()]
    count = sum(1 for entry in every for size in range(1, 7) for _ in groups(entry, size))
    assert count > 150
    assert last.startswith(f"{count} schedules proved on 1 to 6 ranks"), last


def test_explain_shows_the_schedule_beside_the_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("explain", "all_reduce", "--ranks", "12", "--bytes", "24M", "--algorithm", "torus", "--grid", "4x3")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    row = next(line for line in out.splitlines() if line.startswith("messages sent"))
    assert row.split()[-2:] == ["10", "10"]
    row = next(line for line in out.splitlines() if line.startswith("bytes sent"))
    assert row.split()[-2:] == [str(2 * 11 * (24 << 20) // 12)] * 2
    row = next(line for line in out.splitlines() if line.startswith("predicted ms"))
    assert row.split()[-1] == row.split()[-2]
    assert "step 9" in out


def test_a_barrier_is_priced_without_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "barrier", "--ranks", "4", "--algorithm", "tree")
    assert status == 0
    assert "barrier of 0 bytes on 4 ranks by tree" in out


def test_explain_without_an_algorithm_ranks_them(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "all_reduce", "--ranks", "16", "--bytes", "25M")
    assert status == 0
    names = [line.split()[0] for line in out.splitlines()[3:]]
    assert names.index("torus") < names.index("ring") < names.index("tree") < names.index("central")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "all_reduce", "--ranks", "6", "--bytes", "1", "--algorithm", "rnig"), "no algorithm 'rnig'"),
        (
            ("explain", "all_reduce", "--ranks", "6", "--bytes", "1", "--algorithm", "torus", "--grid", "5x2"),
            "grid 5x2 holds 10 ranks, expected 6",
        ),
        (("explain", "all_reduce", "--ranks", "6", "--bytes", "1", "--grid", "3x2"), "--grid needs --algorithm"),
        (("explain", "all_reduce", "--ranks", "6"), "expected --bytes, such as 64K or 25M"),
        (("explain", "barrier", "--ranks", "6", "--bytes", "1"), "a barrier carries no bytes"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.replace("\n(What it means", "").count("\n") == 1
    assert out == ""


WRONG = [
    ("", "the following arguments are required: COMMAND"),
    ("verfiy", "there is no command 'verfiy' (did you mean 'verify'?)"),
    ("verify -n", "there is no option '-n'"),
    ("verify --max-rank x", "argument --max-ranks: expected a number ≥ 1, got 'x'"),
    ("explain", "the following arguments are required: COLLECTIVE, --ranks"),
    ("explain al_reduce --ranks 4 --bytes 1", "there is no collective 'al_reduce' (did you mean 'all_reduce'?)"),
    ("explain all_reduce --ranks 0 --bytes 1", "argument --ranks: expected a number ≥ 1, got '0'"),
    ("explain all_reduce --ranks 4 --bytes 1Q", "expected a size such as 4, 64K, 25M or 1G, got '1Q'"),
    ("explain all_reduce --ranks 4 --bytes 1 --gird 2x2", "no option '--gird' (did you mean '--grid'?)"),
    ("explain all_reduce --ranks 4 --bytes 1 --grid 2by2", "expected a grid such as 4x3, got '2by2'"),
    (
        "explain all_reduce --ranks 4 --bytes 1 --alpha fast",
        "argument --alpha: expected seconds ≥ 0",
    ),
    ("explain all_reduce --ranks 4 --bytes 1 --beta nan", "argument --beta: expected seconds ≥ 0"),
    ("verify --max-ranks ²", "argument --max-ranks: expected a number ≥ 1, got '²'"),
    ("status me", "argument PID: expected a number ≥ 1, got 'me'"),
    ("doctor now", "there is no argument 'now'"),
    ("run train.py", "the following arguments are required: --ranks"),
    ("run --rank 0 train.py", "argument --ranks: expected a number ≥ 1, got '0'"),
    ("serve", "the following arguments are required: --workers"),
    ("serve --worker 2 --staleness-aware men", "no value of --staleness-aware 'men' (did you mean 'mean'?)"),
    ("bench", "the following arguments are required: WHAT"),
    ("bench all-reduce", "there is no command 'all-reduce' (did you mean 'all_reduce'?)"),
    ("bench all_reduce --bytes 4,x", "expected a size such as 4, 64K, 25M or 1G, got 'x'"),
    ("completion fish", "there is no shell 'fish'"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_line_is_refused_with_usage_and_one_sentence(
    capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(line.split())
    assert refused.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "usage: ringred" in told.err
    assert message in told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completions_name_every_command(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    status, out, _ = run(capsys, "completion", shell)
    assert status == 0
    assert all(command in out for command in ("verify", "explain", "bench", "run", "status", "doctor", "help"))


@pytest.mark.parametrize(
    "line",
    [
        "verify --max-ranks 3",
        "explain all_reduce --ranks 4 --bytes 1M",
        "explain all_reduce --ranks 4 --bytes 1M --algorithm torus",
        "topology",
        "help",
    ],
)
def test_json_is_json(capsys: pytest.CaptureFixture[str], line: str) -> None:
    status, out, _ = run(capsys, *line.split(), "--json")
    assert status == 0
    found = json.loads(out)
    if "torus" in line:
        assert found["seconds"] == pytest.approx(found["closed_form_seconds"])
        assert found["schedule"][0][0] == [["send", 1, 2, 4], ["add", 1, 0, 2]]
    if line.startswith("verify"):
        assert found["proved"] == sum(row["proved"] for row in found["algorithms"])


def test_topology_tells_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "topology")
    assert status == 0
    assert "cores this process may use" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2", "--min", "3", __file__], "expected --min of at most 2 ranks, got 3"),
        (["--ranks", "2", "--hosts", "2", __file__], "several hosts need --meet HOST:PORT and --secret FILE"),
        (["--ranks", "2", "--meet", "there", "--secret", __file__, __file__], "expected HOST:PORT, got 'there'"),
        (["--ranks", "2", "nowhere.py"], "run: no file nowhere.py"),
    ],
)
def test_run_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, _, err = run(capsys, "run", *arguments)
    assert status == 2
    assert message in err


def test_status_of_what_is_no_rank(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "status", "1")
    assert status == 2
    assert "process 1 is no rank that is running here" in err


def test_doctor_says_what_another_congestion_control_would_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = {}
    for control in ("cubic", "bbr"):
        path = tmp_path / control
        path.write_text(f"{control}\n")
        monkeypatch.setattr(doctor, "_CONGESTION_CONTROL", path)
        good, what, told[control] = doctor._check_tcp()
        assert good
        assert what == f"TCP between hosts: {control}"
    assert told["cubic"] == ""
    assert "docs/how-to/several-hosts.md" in told["bbr"]
