"""The command line, whose options are promises."""

from __future__ import annotations

import pytest

from ringred.collectives.registry import COLLECTIVES, algorithms, groups
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
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    "arguments", [("explain", "all_reduce", "--ranks", "0", "--bytes", "1"), ("explain", "x"), ("verify", "-n"), ()]
)
def test_nonsense_is_refused_with_usage(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert "usage: ringred" in capsys.readouterr().err


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
