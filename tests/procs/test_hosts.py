"""Ranks on two hosts: shared memory within each, Gloo between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from typing import Any

import pytest

from tests.procs.launching import launch_plain


@cache
def no_namespaces() -> str | None:
    """Why this machine cannot play two hosts, or None."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return "needs root, ip and unshare"
    tried = subprocess.run(["ip", "netns", "exec", "none", "true"], capture_output=True, text=True, check=False)
    made = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"no network namespaces: {made.stderr}" if made.returncode or "not permitted" in tried.stderr else None


def on_hosts(task: str) -> list[dict[str, Any]]:
    if reason := no_namespaces():
        pytest.skip(reason)
    ended = launch_plain("on_hosts.py", task)
    assert ended.status == 0, ended.output
    assert not ended.left_behind
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert "ringred-" not in spaces
    return [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]


def test_ranks_of_two_hosts_reach_their_neighbours_by_memory_and_the_others_by_the_network() -> None:
    *ranks, end = on_hosts("all")
    assert end["statuses"] == [0] * 4
    assert [said["rank"] for said in ranks] == [0, 1, 2, 3]
    for said in ranks:
        assert said["transport"] == "shm+torch_p2p"
        assert said["hosts"] == [0, 0, 1, 1]
        assert said["host"] == f"host{said['rank'] // 2}"
        assert said["grid"], "hierarchical and torus put their X on the host"
        assert said["near"]
        assert said["checked"] > 80
        assert said["wrong"] == 0


def test_the_death_of_a_rank_is_told_on_both_hosts() -> None:
    said = on_hosts("death")
    killed = next(line["killed"] for line in said if "killed" in line)
    errors = [line for line in said if "error" in line]
    assert [line["rank"] for line in errors] == [0, 1, 2]
    for line in errors:
        assert "rank 3" in line["error"]
        assert line["raised"] - killed < 5.0
    assert said[-1]["statuses"] == [4, 4, 4, -9]


def test_a_parameter_server_over_two_hosts_flat_and_by_host() -> None:
    *ranks, end = on_hosts("servers")
    assert end["statuses"] == [0] * 4
    nbytes = 4 * (300 * 200 + 200)
    for said in ranks:
        assert said["wrong"] == 0
        assert said["near"] == ([0, 1] if said["rank"] < 2 else [2, 3]), "memory is shared within a host only"
        assert all(address.startswith("tcp://10.77.0.") for address in said["addresses"])
        assert said["pushed"]["flat"] == nbytes
        assert abs(said["pushed"]["host"] - nbytes / 2) < 0.1 * nbytes, "each rank pushes its share"
