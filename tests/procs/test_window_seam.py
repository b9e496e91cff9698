"""Two processes over a shared window, through the executor that everything else runs on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.procs.window_rank import DESCRIPTORS, WINDOW

pytestmark = pytest.mark.procs


def test_the_seam_carries_lent_views_and_puts_between_processes() -> None:
    fd = os.memfd_create("ringred-test")
    try:
        os.ftruncate(fd, 8 * (8 + 4 * DESCRIPTORS) + 2 * WINDOW)
        script = str(Path(__file__).with_name("window_rank.py"))
        ranks = [
            subprocess.Popen([sys.executable, script, str(fd), str(rank)], pass_fds=[fd], stdout=subprocess.PIPE)
            for rank in range(2)
        ]
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        os.close(fd)
    assert [rank.returncode for rank in ranks] == [0, 0]
    shown = [json.loads(output) for output in outputs]
    assert all(result["wrong"] == 0 for rank in shown for result in rank.values())
    total = {name: [rank[name][what] for what in ("sends", "puts") for rank in shown] for name in shown[0]}
    segments = -(-10007 // 512)
    # Half of ring's, direct's and halving-doubling's messages replace, and all of those are put; one-shot has none.
    half = -(-(10007 // 2 + 1) // 512)
    for name in ("ring", "torus", "direct", "halving_doubling", "hierarchical"):
        assert total[name] == [2 * half, 2 * half, half, half]
    assert total["tree"] == [segments, segments, segments, 0]
    assert total["one_shot"] == [segments, segments, 0, 0]
