"""`ringred bench`: it starts ranks where there are none, and measures those of a launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.procs.launching import ROOT, run_to_its_end

pytestmark = [pytest.mark.procs, pytest.mark.timeout(150)]

BENCH = [sys.executable, "-m", "ringred.testing.command", "bench"]


def found(*arguments: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    command = [*launcher, *(BENCH[1:] if launcher else BENCH), *arguments, "--json", "--rounds", "2"]
    ended = run_to_its_end(command, 120, {})
    assert ended.status == 0, ended.output
    assert ended.left_behind == []
    lines = ended.output.splitlines()
    first, last = lines.index("{"), lines.index("}")
    return dict(json.loads("\n".join(lines[first : last + 1])))


def test_all_reduce_is_measured_beside_gloo(tmp_path: Path) -> None:
    picture = tmp_path / "plots" / "bandwidth.png"
    asked = ["--ranks", "3", "--bytes", "4,64K", "--algorithms", "auto,ring", "--plot", str(picture)]
    result = found("all_reduce", *asked)
    assert (result["what"], result["ranks"], result["transport"]) == ("all_reduce", 3, "shm")
    systems = [(row["bytes"], row["system"]) for row in result["rows"]]
    assert systems == [(nbytes, system) for nbytes in (4, 65536) for system in ("auto", "ring", "gloo")]
    for row in result["rows"]:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["bus_bandwidth"] == pytest.approx(4 / 3 * row["bytes"] / row["seconds"])
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_ranks_of_mpirun_are_measured_as_they_are() -> None:
    mpirun = (str(ROOT / "launch" / "mpirun.sh"), "2")
    result = found("ddp", "--width", "64", "--batch", "8", launcher=mpirun)
    assert [(row["ranks"], row["system"]) for row in result["rows"]] == [
        (1, "one rank alone"),
        (2, "auto"),
        (2, "gloo"),
    ]
    alone, ours, _ = result["rows"]
    assert alone["efficiency"] == 1.0
    assert ours["efficiency"] == pytest.approx(alone["seconds"] / ours["seconds"])


def test_scaling_goes_through_the_numbers_of_ranks() -> None:
    result = found("scaling", "--ranks", "3", "--width", "32", "--batch", "4", "--algorithms", "ring", "--without-gloo")
    assert [(row["ranks"], row["system"]) for row in result["rows"]] == [
        (1, "one rank alone"),
        (2, "ring"),
        (1, "one rank alone"),
        (3, "ring"),
    ]
