"""Where the compiled player was not built, Python runs its plans (`make test-python` runs all the tests so)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHOSEN = ("test_errors.py", "test_windows.py", "test_policies.py")


def test_collectives_errors_and_trainings_without_the_extension() -> None:
    files = [f"tests/threads/{name}" for name in CHOSEN]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--without-extension", *files]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


_SAYS = """
import sys
sys.modules["ringred.native._player"] = None
import ringred
from ringred.testing import run_ranks
from ringred.transports import shm_player
import torch

def body(comm):
    tensor = torch.ones(3)
    comm.all_reduce(tensor)
    return comm.transport.player, tensor.tolist()

print(run_ranks(body, 2, "shm"))
print(shm_player.engine(None))
"""


def test_it_says_that_python_runs_plans_and_why() -> None:
    ended = subprocess.run([sys.executable, "-c", _SAYS], capture_output=True, text=True, timeout=60, check=True)
    results, engine = ended.stdout.splitlines()
    assert results == "[(None, [2.0, 2.0, 2.0]), (None, [2.0, 2.0, 2.0])]"
    assert engine.startswith("Python (it was not built, or does not fit this Python:")
