"""How the package is laid out: rooms, floors, no circles, no long files, and the names that users import."""

from __future__ import annotations

import ast
import importlib
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ringred"

PUBLIC = {
    "ringred": (
        "CollectiveMismatch CollectiveTimeout Communicator DistributedDataParallel Elastic ElasticSampler GridError "
        "ModelMismatch NonFiniteGradient ParameterServer PeerFailed PolicyError ReduceOp ReplicasDiverged RingredError "
        "SyncBatchNorm TooFewWorkers TransportUnavailable UnknownAlgorithm UnsupportedTensor Work algorithms "
        "checkpoint hooks init optim reports torch_backend"
    ),
    "ringred.buckets": "Bucket Entry SparseBucket assign",
    "ringred.collectives.registry": "algorithm algorithms lookup prove",
    "ringred.communicator": "Communicator init",
    "ringred.ddp": "DistributedDataParallel",
    "ringred.errors": "DeadlockError OverwriteError RingredError ScheduleError",
    "ringred.hooks": "FusedOptimizer Half Int8 LocalSGD Policy PowerSGD TopK all_reduce_hook comm_hook",
    "ringred.optim": "LinearScaling ShardedOptimizer",
    "ringred.parameter_server": "Hogwild Keys ParameterServer Placement Report Store load_keys make_keys save_keys",
    "ringred.parameter_server.policies": (
        "Async BoundedStaleness Decision Gradient KAsync KBatchAsync KBatchSync KSync POLICIES Policy SoftSync Sync "
        "parse"
    ),
    "ringred.parameter_server.simulate": "Event Simulated simulate",
    "ringred.parameter_server.times": "Exponential Pareto Recorded ShiftedExponential Slowed",
    "ringred.schedule.cost": "simulate",
    "ringred.schedule.draw": "draw",
    "ringred.schedule.ir": "Recv Send Spec Step",
    "ringred.schedule.verify": "Proof verify",
    "ringred.testing": "Faulty run_ranks",
    "ringred.testing.conformance": "BREAKING CHECKS",
    "ringred.testing.conformance_plans": "BREAKING CHECKS",
    "ringred.topology.detect": "machine",
    "ringred.topology.model": "Topology flat hosts",
    "ringred.torch_backend": "monitored_barrier register",
    "ringred.transports.base": "Counters Fault FaultKind Transport Windowed",
}


@cache
def imports() -> dict[str, frozenset[str]]:
    """The rooms that each room imports: packages and modules of the first level, for type checkers only as well."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":  # it names what users import, and imports it when they do
            continue
        own = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ringred"):
                parts = (node.module or "").split(".")
                own.update([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
            elif isinstance(node, ast.Import):
                own.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ringred."))
        own.discard(room)
    return {room: frozenset(others) for room, others in found.items()}


def floor(room: str, above: tuple[str, ...] = ()) -> int:
    assert room not in above, f"a circle: {' -> '.join([*above, room])}"
    return 1 + max((floor(below, (*above, room)) for below in imports()[room]), default=0)


def test_rooms_floors_and_no_circle() -> None:
    floors = {room: floor(room) for room in imports()}
    assert len(floors) <= 17, sorted(floors)
    assert max(floors.values()) <= 9, floors
    used = frozenset[str]().union(*imports().values())
    assert [room for room in floors if not imports()[room] and room not in used] == [], "nothing stands alone"


def test_the_room_reads_as_few_names() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= 17, sorted(entries)


def test_no_file_is_long() -> None:
    folders = ("ringred", "tests", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


@pytest.mark.parametrize("module", PUBLIC)
def test_no_public_name_is_lost(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in PUBLIC[module].split() if not hasattr(found, name)] == []


def test_the_version_is_one() -> None:
    import ringred

    assert f"\nversion: {ringred.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_program_has_the_name_of_a_module_of_pythons() -> None:
    """The folder of a program comes first where Python looks for modules: also for torch's and Python's own imports."""
    newer = {"annotationlib", "compression"}  # than the oldest Python that this runs on
    for folder in ("benchmarks", "examples", "examples/gpt", "tests/procs/programs", "tests/torch_suite"):
        names = {path.stem for path in (ROOT / folder).iterdir() if path.is_dir() or path.suffix == ".py"}
        assert not names & (sys.stdlib_module_names | newer), folder
