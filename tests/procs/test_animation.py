"""`ringred explain --html` in a real browser, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from ringred.testing.command.main import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [pytest.mark.procs, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]

SHOWN = [
    ("all_reduce", "ring", 8, [], 14),
    ("all_reduce", "torus", 12, ["--grid", "4x3"], 10),
    ("all_reduce", "double_tree", 12, [], None),
    ("all_reduce", "halving_doubling", 16, [], 8),
    ("broadcast", "tree", 7, [], 3),
    ("all_reduce", "one_shot", 1, [], 0),
]


def opened(page: Path, place: str) -> str:
    """The page, as the browser has it after its script ran. What goes wrong there is raised."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", f"{page.as_uri()}#{place}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    wrong = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    assert not wrong, wrong
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def words(dom: str, name: str) -> str:
    return re.sub(
        r"<[^>]+>", " ", dom.split(f'id="{name}"', 1)[1].split(">", 1)[1].split("</table>")[0].split("</div>")[0]
    )


@pytest.mark.parametrize(("collective", "name", "ranks", "more", "rounds"), SHOWN)
def test_it_shows_the_first_round_and_the_end(
    tmp_path: Path, collective: str, name: str, ranks: int, more: list[str], rounds: int | None
) -> None:
    path = tmp_path / "page.html"
    asked = [collective, "--ranks", str(ranks), "--bytes", "4M", "--algorithm", name, *more, "--html", str(path)]
    assert main(["explain", *asked]) == 0
    first = opened(path, "round=0")
    if rounds is not None:
        assert f"0 / {rounds}<" in first
    assert ("Round 1 of" in words(first, "told")) == (rounds != 0)
    for clock in ("rounds", "time"):
        last = opened(path, f"clock={clock}&round=1e9&unit=0&layout=row")
        assert "It is done." in words(last, "told")
        whole = re.search(r"chunks that are whole\s+(\d+) of (\d+)", words(last, "figures"))
        assert whole is not None
        assert whole[1] == whole[2] != "0"
        sent = re.search(r"messages sent\s+(\d+) of (\d+)", words(last, "figures"))
        assert sent is not None
        assert sent[1] == sent[2]
