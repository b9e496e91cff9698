"""The environment, read in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringred.runtime.config import Config, Launch, detect_launch, mpi_environment, mpirun_environment


def test_defaults_and_settings() -> None:
    assert Config.from_environment({}) == Config(tuning=Path("~/.cache/ringred/tuning.json").expanduser())
    given = {
        "RINGRED_TIMEOUT": "2.5",
        "RINGRED_SEGMENT_BYTES": "4096",
        "RINGRED_TRANSPORT": "torch_p2p",
        "RINGRED_INTERFACE": "10.0.0.1",
        "RINGRED_TRACE": "trace.json",
        "RINGRED_TUNING": "off",
    }
    assert Config.from_environment(given) == Config(2.5, 4096, "torch_p2p", "10.0.0.1", "trace.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RINGRED_TIMEOUT", "soon"),
        ("RINGRED_TIMEOUT", "0"),
        ("RINGRED_TIMEOUT", "nan"),
        ("RINGRED_SEGMENT_BYTES", "-1"),
        ("RINGRED_TRANSPORT", "x"),
    ],
)
def test_nonsense_names_the_variable_and_what_it_held(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .*'{text}'"):
        Config.from_environment({name: text})


def test_launchers() -> None:
    store = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert detect_launch(store) == Launch("store", 1, 4, "0")
    assert detect_launch({**store, "TORCHELASTIC_RESTART_COUNT": "2"}).restart == "2"
    for lonely in ({"RANK": "1", "WORLD_SIZE": "4"}, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}):
        with pytest.raises(ValueError, match="nothing says how they find each other"):
            detect_launch(lonely)
    assert detect_launch({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}) == Launch("mpi", 2, 3)
    assert detect_launch({"PMI_RANK": "0", "PMI_SIZE": "2"}) == Launch("mpi", 0, 2)
    assert detect_launch({}) == Launch("single", 0, 1)


def test_what_the_user_set_stays() -> None:
    environment = {"OMPI_MCA_mpi_yield_when_idle": "0"}
    mpi_environment(environment)
    assert environment.pop("OMPI_MCA_mpi_yield_when_idle") == "0"
    assert environment.pop("I_MPI_THREAD_YIELD") == "1"
    assert set(environment.values()) == {"1048576"}
    assert len(environment) == 3
    assert mpirun_environment({"OMPI_MCA_btl": "self,sm"})["OMPI_MCA_btl"] == "self,sm"
