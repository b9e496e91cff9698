"""DistributedDataParallel goes on when ranks fail: what is repeated, and that the bits are those of the ranks left."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ringred
from ringred.communicator import Communicator
from ringred.errors import PeerFailed
from ringred.testing import run_ranks

TRANSPORTS = pytest.mark.parametrize("transport", ["local", "shm", "torch_p2p"])
STEPS = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.BatchNorm1d(50), nn.Linear(50, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def batch(rank: int, step: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 20, generator=torch.Generator().manual_seed(100 * step + rank))


def train(
    comm: Communicator,
    was: int,
    steps: range,
    state: dict[str, object] | None = None,
    before: Callable[[str, int, int], None] = lambda place, step, rank: None,
    weighed: bool = False,
    **options: object,
) -> tuple[list[dict[str, Tensor]], int]:
    """Trains; `before(place, step, rank)` is called at places of each step. Returns the weights after each step, and
    how many ranks there were in the end."""
    net = Net()
    if state is not None:
        net.load_state_dict(state)
    options = {"on_failure": "shrink", "bucket_cap_mb": 0.002, **options}
    model = ringred.DistributedDataParallel(net, process_group=comm, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    for step in steps:
        optimizer.zero_grad()
        before("forward", step, was)
        if weighed:
            model.weigh(was + 1)
        output = model(batch(was, step))
        output.register_hook(lambda gradient, step=step: before("backward", step, was))
        before("loss", step, was)
        output.square().mean().backward()
        before("step", step, was)
        optimizer.step()
        seen.append(copy.deepcopy(net.state_dict()))
    return seen, model.comm.size


def dying(rank: int, step: int, place: str) -> Callable[[str, int, int], None]:
    def before(here: str, now: int, who: int) -> None:
        if (here, now, who) == (place, step, rank):
            raise ZeroDivisionError("no batch left")

    return before


@TRANSPORTS
@pytest.mark.parametrize("place", ["forward", "backward", "loss", "step"])
@pytest.mark.parametrize("victim", [0, 2])
def test_three_go_on_as_three_would_have_from_there(victim: int, place: str, transport: str) -> None:
    """After the death of one of four the weights are, bit by bit, those of three ranks that begin with the last step
    that was done."""
    died = 3
    left = [rank for rank in range(4) if rank != victim]

    def of_four(comm: Communicator) -> tuple[list[dict[str, Tensor]], int]:
        return train(comm, comm.rank, range(STEPS), before=dying(victim, died, place), deterministic=True)

    results = run_ranks(of_four, 4, transport, return_exceptions=True)
    assert isinstance(results[victim], ZeroDivisionError)
    seen = {rank: results[rank][0] for rank in left}
    assert all(results[rank][1] == 3 for rank in left), results
    for step in range(STEPS):
        for name in ("layers.0.weight", "layers.3.bias"):
            assert all(torch.equal(seen[left[0]][step][name], seen[rank][step][name]) for rank in left), (step, name)
    done = died + 1 if place == "step" else died  # after its backward all had the gradients of all four

    def of_three(comm: Communicator) -> tuple[list[dict[str, Tensor]], int]:
        was = left[comm.rank]
        return train(comm, was, range(done, STEPS), state=seen[was][done - 1], deterministic=True)

    for rank, (fresh, _) in zip(left, run_ranks(of_three, 3, transport), strict=True):
        for step in range(done, STEPS):
            for name in ("layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"):
                assert torch.equal(fresh[step - done][name], seen[rank][step][name]), (rank, step, name)


@pytest.mark.parametrize("place", ["forward", "backward", "step"])
def test_weighed_means_count_the_samples_that_there_are(place: str) -> None:
    def of_three(comm: Communicator) -> tuple[list[dict[str, Tensor]], int]:
        return train(comm, comm.rank, range(STEPS), before=dying(1, 2, place), weighed=True, deterministic=True)

    results = run_ranks(of_three, 3, "shm", return_exceptions=True)
    done = 3 if place == "step" else 2
    start = results[0][0][done - 1]

    def of_two(comm: Communicator) -> tuple[list[dict[str, Tensor]], int]:
        was = (0, 2)[comm.rank]
        return train(comm, was, range(done, STEPS), state=start, weighed=True, deterministic=True)

    fresh = run_ranks(of_two, 2, "shm")[0][0]
    for step in range(done, STEPS):
        for name in ("layers.0.weight", "layers.3.bias"):
            assert torch.equal(fresh[step - done][name], results[0][0][step][name]), (step, name)


def test_one_after_the_other_dies() -> None:
    def before(place: str, step: int, rank: int) -> None:
        if place == "backward" and rank == step + 1:
            raise ZeroDivisionError("no batch left")

    def body(comm: Communicator) -> tuple[list[dict[str, Tensor]], int]:
        return train(comm, comm.rank, range(STEPS), before=before)

    results = run_ranks(body, 4, "shm", return_exceptions=True)
    assert results[0][1] == 1
    assert all(isinstance(result, ZeroDivisionError) for result in results[1:])


def test_an_error_of_all_ranks_ends_the_job() -> None:
    def body(comm: Communicator) -> object:
        def before(place: str, step: int, rank: int) -> None:
            if (place, step) == ("loss", 2):
                raise ValueError("a bug in the loss")

        return train(comm, comm.rank, range(STEPS), before=before)

    assert all(isinstance(result, ValueError) for result in run_ranks(body, 3, "shm", return_exceptions=True))


def test_two_models_of_one_step() -> None:
    def body(comm: Communicator) -> list[Tensor]:
        nets = [nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)]
        for net in nets:
            nn.init.eye_(net.weight)
        models = [ringred.DistributedDataParallel(net, process_group=comm, on_failure="shrink") for net in nets]
        for step in range(4):
            x = torch.full((2, 5), float(comm.rank + 1))
            if comm.rank == 2 and step == 2:
                raise ZeroDivisionError("no batch left")
            (models[1](models[0](x)) ** 2).mean().backward()
        assert {model.comm.size for model in models} == {2}
        return [net.weight.grad for net in nets]  # type: ignore[misc]

    first, second, third = run_ranks(body, 3, "shm", return_exceptions=True)
    assert isinstance(third, ZeroDivisionError)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "shrug"}, "on_failure is 'raise' or 'shrink', got 'shrug'"),
        ({"on_failure": "shrink", "gradient_as_bucket_view": True}, "does not go with gradient_as_bucket_view=True"),
    ],
)
def test_what_does_not_go_with_it(options: dict[str, object], message: str) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            ringred.DistributedDataParallel(Net(), process_group=comm, **options)  # type: ignore[arg-type]

    run_ranks(body, 2)


def test_without_it_a_failure_is_raised_as_ever() -> None:
    def body(comm: Communicator) -> None:
        train(comm, comm.rank, range(STEPS), before=dying(1, 2, "backward"), on_failure="raise")

    results = run_ranks(body, 3, "shm", return_exceptions=True)
    assert isinstance(results[0], PeerFailed)
    assert isinstance(results[2], PeerFailed)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_an_all_reduce_between_two_steps_counts_those_that_are_left(victim: int) -> None:
    def body(comm: Communicator) -> tuple[list[float], int]:
        model = ringred.DistributedDataParallel(nn.Linear(3, 3), process_group=comm, on_failure="shrink")
        state = ringred.Elastic(model)
        seen = []
        for step in state.steps(5):
            model(torch.ones(2, 3)).sum().backward()
            if (step, comm.rank) == (2, victim):
                raise ZeroDivisionError("no batch left")
            seen.append(state.all_reduce(torch.ones(2)).sum().item())
        return seen, model.comm.size

    results = run_ranks(body, 3, "shm", return_exceptions=True)
    assert isinstance(results.pop(victim), ZeroDivisionError)
    assert results == [([6.0, 6.0, 4.0, 4.0, 4.0], 2)] * 2


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("place", ["first", "second", "both"])
def test_two_models_one_after_the_other(place: str, victim: int) -> None:
    """The ranks change in the backward of one model while the other's is under way, on some ranks."""

    def body(comm: Communicator) -> tuple[list[Tensor], int]:
        nets = [nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)]
        for net in nets:
            nn.init.eye_(net.weight)
        first, second = (
            ringred.DistributedDataParallel(net, process_group=comm, on_failure="shrink", deterministic=True)
            for net in nets
        )
        for step in range(4):
            x = torch.full((2, 5), float(comm.rank + 1))

            def dies(here: str, step: int = step) -> None:
                if comm.rank == victim and step == 2 and here == place:
                    raise ZeroDivisionError("no batch left")

            out, other = first(x), second(x)
            if place == "both":
                out.register_hook(lambda gradient: dies("both"))
                (out * other).mean().backward()
            else:
                dies("first")
                out.square().mean().backward()
                dies("second")
                other.mean().backward()
        return [net.weight.grad for net in nets], first.comm.size  # type: ignore[misc]

    results = run_ranks(body, 3, "shm", return_exceptions=True)
    assert isinstance(results.pop(victim), ZeroDivisionError)
    (one, size), (other, _) = results
    assert size == 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_generator_of_the_models_gpu_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    there, seen = torch.arange(16, dtype=torch.uint8), []

    def body(comm: Communicator) -> None:
        state = ringred.Elastic(
            ringred.DistributedDataParallel(nn.Linear(2, 2), process_group=comm, on_failure="shrink")
        )
        monkeypatch.setattr(ringred.DistributedDataParallel, "device", torch.device("cuda", 3))
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: there)
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda given, device: seen.append((given, device)))
        state.take_over(state.handed_over())
        of_cpus = state.handed_over()
        del of_cpus["random"]["cuda"]
        state.take_over(of_cpus)

    run_ranks(body, 1)
    ((given, device),) = seen
    assert torch.equal(given, there)
    assert device == torch.device("cuda", 3)
