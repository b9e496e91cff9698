"""Registration is all it takes, and nothing is registered by half."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ringred
from ringred.collectives import registry
from ringred.collectives.registry import COLLECTIVES, algorithm, algorithms, lookup
from ringred.errors import GridError, UnknownAlgorithm

PACKAGE = Path(ringred.__file__).parent


def test_every_file_in_collectives_registers_something() -> None:
    for collective in COLLECTIVES:
        algorithms(collective)
    registering = {
        entry.schedule.__module__.rpartition(".")[2]
        for table in map(algorithms, COLLECTIVES)
        for entry in table.values()
        if entry.schedule is not None
    }
    files = {path.stem for path in (PACKAGE / "collectives").glob("*.py")} - {"__init__", "registry"}
    assert files - registering == {"native"}
    assert lookup("all_reduce", "native").native


def test_the_issue_of_names() -> None:
    expected = "central direct double_tree halving_doubling hierarchical native one_shot ring torus tree"
    assert ringred.algorithms("all_reduce") == expected.split()
    assert ringred.algorithms("reduce_scatter") == ringred.algorithms("all_gather") == ["direct", "ring", "torus"]
    assert ringred.algorithms("broadcast") == ["chain", "tree"]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        UnknownAlgorithm, match=r"all_reduce: no algorithm 'rnig' \(did you mean 'ring'\?\); there are .*ring"
    ):
        lookup("all_reduce", "rnig")
    with pytest.raises(ValueError, match="no collective 'allreduce'"):
        ringred.algorithms("allreduce")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered already"):
        algorithm("all_reduce", "ring")(lambda rank, group: iter(()))


def test_grids_are_checked_before_anything_runs() -> None:
    with pytest.raises(GridError, match="holds 12 ranks, expected 10"):
        lookup("all_reduce", "torus").group(10, grid=(4, 3))
    with pytest.raises(GridError, match="'ring' takes no grid"):
        lookup("all_reduce", "ring").group(4, grid=(2, 2))
    assert lookup("all_reduce", "torus").group(12).grid == (4, 3)


def test_an_algorithm_of_ones_own_is_proved_like_the_others() -> None:
    def backwards(rank: int, group: registry.Group) -> registry.Steps:
        """The ring, the other way round."""
        from ringred.collectives.ring import all_gather_on, reduce_scatter_on
        from ringred.schedule.ir import unit

        members = list(reversed(range(group.size)))
        chunks = [unit(u) for u in range(group.size)]
        yield from reduce_scatter_on(members, rank, chunks)
        yield from all_gather_on(members, rank, chunks)

    algorithm("all_reduce", "backwards")(backwards)
    try:
        entry = lookup("all_reduce", "backwards")
        assert entry.summary == "The ring, the other way round."
        proof = registry.prove(entry, entry.group(5))
        assert proof.messages == (8,) * 5
    finally:
        del registry._REGISTRY["all_reduce"]["backwards"]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_each_dependency_has_one_importer_and_the_environment_one_reader() -> None:
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        assert (where == "transports/mpi.py") or not any(name.startswith("mpi4py") for name in imported(path)), where
        if where not in ("runtime/config.py",):
            assert "environ" not in path.read_text().replace("environment", ""), where


def test_the_executor_names_no_transport_and_no_algorithm() -> None:
    text = (PACKAGE / "runtime" / "executor.py").read_text()
    names = {*ringred.algorithms("all_reduce"), "mpi", "gloo", "shm", "torch_p2p"} - {"direct", "tree", "native"}
    assert not [name for name in names if f'"{name}"' in text or f".{name} " in text]


def test_schedules_need_no_torch_and_the_package_no_mpi() -> None:
    script = """
import sys, ringred, ringred.testing.command.main, ringred.schedule.draw, ringred.runtime.select
from ringred.collectives import registry
assert len(registry.algorithms("all_reduce")) > 8
assert "torch" not in sys.modules, "torch was imported"
ringred.init, ringred.DistributedDataParallel
assert "torch" in sys.modules
assert not {"mpi4py", "cupy"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_what_the_package_exports() -> None:
    for name in ringred.__all__:
        assert getattr(ringred, name) is not None
    assert set(ringred.__all__) <= set(dir(ringred))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ringred.nothing
