"""The compiled player under the sanitizers: ranks that are threads over one memory (ranks.c), and mutants of it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ringred import native
from ringred.transports import futex

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NATIVE = ROOT / "ringred" / "native"
COMPILER = shutil.which("cc")
FLAGS = ("-g", "-O1", "-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-tsan", "-D_GNU_SOURCE", "-ffp-contract=off")
ALONE = "-DNOTHING_IS_SHARED"

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.mark.skipif(futex.unavailable() is not None, reason="the player is not written for this machine")
def test_the_player_is_there_where_it_can_be_built() -> None:
    """Its build may fail without a word, and the tests of it would be skipped."""
    assert native.player is not None, native.reason


def built(folder: Path, sanitizers: str, *macros: str, sources: Path = NATIVE) -> Path:
    program = folder / "ranks"
    sanitize = ["-fsanitize=" + sanitizers, "-fno-sanitize-recover=all"] if sanitizers else []
    files = [HERE / "ranks.c", *(sources / name for name in ("tape.c", "folds.c", "copy.c"))]
    command = [COMPILER, *FLAGS, *sanitize, *macros, f"-I{sources}", *files, "-o", program, "-lpthread"]
    made = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if "cannot find" in made.stderr:
        pytest.skip(f"this compiler has no library for -fsanitize={sanitizers}")
    assert made.returncode == 0, made.stderr
    return program


def played(program: Path, ranks: int, turns: int, seed: int = 1) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(ranks), str(turns), str(seed)]
    at_once = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=at_once)


# With blocks of a line LEAST_BLOCK alone says how much a fold takes at a time, as where it has hundreds of operands.
@pytest.mark.parametrize("how", [[""], ["", "-DBLOCK_BYTES=64"], ["thread"], ["address,undefined"]], ids=str)
def test_ranks_play_and_nothing_is_found(tmp_path: Path, how: list[str]) -> None:
    program = built(tmp_path, *how)
    for ranks, seed in itertools.product((2, 3, 5), (1, 2)):
        ended = played(program, ranks, 40, seed)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert ended.stdout == f"{ranks} ranks, 40 turns: all right\n"


def test_lines_are_written_back_before_they_are_given_back(tmp_path: Path) -> None:
    ended = played(built(tmp_path, "thread", ALONE), 2, 200)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.timeout(280)
def test_calls_from_python_under_the_sanitizers(tmp_path: Path) -> None:
    """The extension as Python has it, with module.c and recall.c: calls, memories of them, and errors amid one."""
    assert COMPILER is not None, "skipped above"
    shutil.copytree(ROOT / "ringred", tmp_path / "ringred", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = [NATIVE / name for name in ("module.c", "recall.c", "tape.c", "folds.c", "copy.c")]
    extension = tmp_path / "ringred" / "native" / "_player.abi3.so"
    macros = ["-DPy_LIMITED_API=0x030a0000", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}"]
    command = [COMPILER, *FLAGS, *sanitize, *macros, *map(str, files), "-o", str(extension)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    first = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in first):
        pytest.skip("this compiler has no library for -fsanitize=address")
    # Python keeps some memory for good; a `malloc` of its own would hide what is wrong with the rest.
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0", "PYTHONMALLOC": "malloc"}
    environment = {**os.environ, **options, "LD_PRELOAD": ":".join(first), "OMP_NUM_THREADS": "1"}
    loaded = [sys.executable, "-c", "from ringred import native; print(native.player.__file__)"]
    where = subprocess.run(loaded, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert where.strip() == str(extension)
    tests = [f"tests/threads/test_{name}.py" for name in ("recall", "recall_interrupted", "tape", "player")]
    chosen = ["-k", "not folds and not rounded and not ctrl_c", "-p", "no:cacheprovider", "-s"]
    asked = [sys.executable, "-m", "pytest", "-q", *chosen, *tests]
    ended = subprocess.run(
        asked, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "skipped" not in ended.stdout


MUTANTS = {
    "a word is published before what it tells of": ("waits.h", "__ATOMIC_RELEASE", "__ATOMIC_RELAXED"),
    "a word is looked at after what it tells of": ("waits.h", "__ATOMIC_ACQUIRE", "__ATOMIC_RELAXED"),
    "a message is given back before it is read": (
        "tape.c",
        "memcpy(target, (char *)link->window",
        "consume(player, link, number), memcpy(target, (char *)link->window",
    ),
    "slots are given back before they are read": (
        "tape.c",
        "else fetch(",
        "else consume(player, link, number), fetch(",
    ),
    "slots are used again at once": ("slots.h", "if (!consumed(link, link->large_used[at])) return -1;", ";"),
    "shared slots are used again at once": (
        "slots.h",
        "if (!consumed(links + peer, links[peer].shared_used[at])) return -1;",
        "(void)links;",
    ),
    "only the first reader of a shared copy is waited for": (
        "slots.h",
        "shared_used[at] = number;",
        "shared_used[at] = link == (const Link *)(rank + 1) ? number : 0;",
    ),
    "a send is not waited for": ("tape.c", "if (consumed(link, request->until)) return DONE;", "return DONE;"),
    "a lent message is given back before it is folded": (
        "tape.c",
        "fold(&player, words);\n",
        "for (int64_t k = 0; k < words[7]; k++) consume(&player, player.links + player.requests[words[8 + k]].link, "
        "player.requests[words[8 + k]].number);\n            fold(&player, words);\n",
    ),
}
BY_TWO = {  # of two ranks, which share no slots
    "lines are written back after a copy was given back": (
        "tape.c",
        "        consume(player, link, number);\n        if (kind",
        "        consume(player, link, number);\n"
        "        if (kind == SLOT && nbytes) own_lines((char *)link->window + offset, LINE);\n        if (kind",
    ),
    "lines are written back after a loan was given back": (
        "tape.c",
        "    free((void *)request->staging);\n    request->staging = request->view",
        "    if (request->in_slots) own_lines((char *)request->view, LINE);\n"
        "    free((void *)request->staging);\n    request->staging = request->view",
    ),
}


@pytest.mark.parametrize("what", [*MUTANTS, *BY_TWO])
def test_a_player_with_a_mistake_is_found_out(tmp_path: Path, what: str) -> None:
    name, right, wrong = (MUTANTS | BY_TWO)[what]
    copy = tmp_path / "native"
    shutil.copytree(NATIVE, copy, ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    text = (copy / name).read_text()
    assert right in text
    (copy / name).write_text(text.replace(right, wrong))
    macros, sizes = ([], (5, 3, 2)) if what in MUTANTS else ([ALONE], (2,))
    program = built(tmp_path, "thread", *macros, sources=copy)
    assert any(played(program, ranks, 400).returncode != 0 for ranks in sizes)
