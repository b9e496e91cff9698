"""How often `ringred bench all_reduce` calls what it measures."""

import time

import torch

from ringred.communicator import Communicator
from ringred.testing import run_ranks
from ringred.testing.bench import all_reduce


def test_each_system_is_called_for_as_long_and_as_often_on_all_ranks() -> None:
    def body(comm: Communicator) -> dict[str, int]:
        calls = {"slow": lambda: time.sleep(0.02 * (1 + comm.rank)), "fast": lambda: None}
        return all_reduce._counts(comm, calls)

    first, second = run_ranks(body, 2)
    assert first == second
    assert first["fast"] > first["slow"] == 1


def test_the_first_call_is_not_timed() -> None:
    buffer, waits = torch.zeros(3), iter([0.2, 0.0, 0.0, 0.0])
    seconds = all_reduce._timer(lambda: time.sleep(next(waits)), buffer, 3)()
    assert seconds < 0.06
    assert next(waits, None) is None
    assert buffer.tolist() == [2.0, 2.0, 2.0]
