"""The code on the pages of the documentation runs, and prints what they say."""

from __future__ import annotations

import re
import sys

import pytest

from tests.procs.launching import PROGRAMS, ROOT, run_to_its_end

pytestmark = [pytest.mark.procs, pytest.mark.timeout(150)]

PAGES = {
    "README.md": 7,
    "docs/index.md": 1,
    "docs/tutorial.md": 9,
    "docs/guide.md": 0,
    "docs/torch.md": 3,
    "docs/faults.md": 6,
    "docs/how-to/from-torch-ddp.md": 3,
    "docs/how-to/from-horovod.md": 2,
    "docs/how-to/overlap-report.md": 3,
    "docs/how-to/write-an-algorithm.md": 6,
    "docs/how-to/which-algorithm.md": 2,
    "docs/how-to/parameter-server-or-all-reduce.md": 1,
}


def test_every_page_with_code_is_here() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    code = {
        str(page.relative_to(ROOT)) for page in pages if re.search(r"^```(python|console)$", page.read_text(), re.M)
    }
    assert code <= PAGES.keys(), code - PAGES.keys()


@pytest.mark.parametrize("page", [page for page, count in PAGES.items() if count])
def test_the_code_of_a_page_runs(page: str) -> None:
    alone = "<!-- ranks: 1 -->" in (ROOT / page).read_text()
    start = [
        sys.executable,
        "-m",
        "ringred.testing.command",
        "run",
        "--ranks",
        "1" if alone else "2",
        "--restarts",
        "0",
    ]
    ended = run_to_its_end([*start, str(PROGRAMS / "page.py"), page], 120, {})
    assert ended.status == 0, ended.output[-3000:]
    assert f"{PAGES[page]} blocks of {page} were run" in ended.output
    assert ended.left_behind == []
