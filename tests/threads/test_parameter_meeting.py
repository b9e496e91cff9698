"""Where servers of their own meet: cards hold as long as their servers live."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ringred.errors import CollectiveTimeout, PolicyError
from ringred.parameter_server.keys import make_keys
from ringred.parameter_server.meeting import card_in, find_servers, keys_in
from ringred.parameter_server.policies import Sync
from ringred.parameter_server.serving import serve


def test_servers_and_workers_find_each_other_in_a_folder(tmp_path: Path) -> None:
    keys = keys_in(tmp_path, 0)
    with card_in(tmp_path, 0, 2, "tcp://127.0.0.1:1"):
        assert keys_in(tmp_path, 1) == keys
        with pytest.raises(CollectiveTimeout, match=r"after 0.1 s: missing \[1\]; is ringred serve up"):
            find_servers(tmp_path, 0.1)
        with card_in(tmp_path, 1, 2, "tcp://127.0.0.1:2"):
            assert find_servers(tmp_path, 0.1) == (["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"], keys)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_in_the_folder_misleads_nobody(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    keys_in(old, 0)
    with card_in(old, 0, 1, "tcp://127.0.0.1:1"):
        shutil.copytree(old, new)  # the same files, and no server that holds them
    with pytest.raises(CollectiveTimeout, match="missing all"):
        find_servers(new, 0.1)
    keys = keys_in(new, 0)
    with card_in(new, 0, 1, "tcp://127.0.0.1:9"):
        assert find_servers(new, 0.1) == (["tcp://127.0.0.1:9"], keys)


def test_a_card_of_another_host_is_believed(tmp_path: Path) -> None:
    keys = keys_in(tmp_path, 0)
    card = {"number": 0, "shards": 1, "address": "tcp://10.0.0.7:1", "place": "another/1/2/3"}
    (tmp_path / "server-0.json").write_text(json.dumps(card))
    assert find_servers(tmp_path, 0.1) == (["tcp://10.0.0.7:1"], keys)


def test_keys_of_ones_own_are_refused_where_server_0_makes_them(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="in a folder server 0 makes the keys; --keys goes with --addresses"):
        serve(Sync(), 1, folder=tmp_path, keys=make_keys())
