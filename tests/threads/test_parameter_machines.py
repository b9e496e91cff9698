"""The coordinator and a shard as state machines: what each message leads to, in one thread and without a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ringred.errors import PolicyError
from ringred.parameter_server import messages as m
from ringred.parameter_server.coordinator import Coordinator, Order
from ringred.parameter_server.policies import Gradient, KAsync, KSync, Policy, Sync
from ringred.parameter_server.rules import Rule, rule_of
from ringred.parameter_server.shard import PASSED, Answer, Memory, Shard

ADD = Rule("add", [{}])


def a_shard(*pieces: tuple[int, int]) -> Shard:
    """With zeros in pieces of these (number, elements)."""
    shard = Shard(0, Memory())
    entries = [[number, [elements], "float32", 0] for number, elements in pieces]
    text = json.dumps({"rule": ADD.as_json(), "pieces": entries})
    (answer,) = shard.handle(b"w", 1, m.Create(text), [torch.zeros(elements) for _, elements in pieces])
    assert answer.message == m.Created(-1)
    return shard


def part(shard: Shard, worker: int, sequence: int, value: float, pieces: tuple[int, ...] = (0,), life: int = 1) -> Any:
    frames = [torch.full((shard.values[piece].numel(),), value) for piece in pieces]
    (answer,) = shard.handle(b"w", 2, m.Part(worker, life, sequence, 0, pieces, ()), frames)
    return answer.message


def apply(shard: Shard, version: int, *gradients: Gradient) -> list[Answer]:
    return shard.handle(b"c", 3, m.Apply(version, 1.0, gradients, (1.0,) * len(gradients), ()), ())


def test_an_update_is_made_once_and_in_order() -> None:
    shard = a_shard((0, 4))
    assert part(shard, 0, 0, 2.0) == m.Held(0)
    assert part(shard, 1, 0, 4.0) == m.Held(0)
    assert apply(shard, 2, Gradient(0, 0, 0)) == [], "the update before is missing: both come again"
    pair = Gradient(0, 0, 0), Gradient(1, 0, 0)
    for _ in range(2):
        assert [answer.message for answer in apply(shard, 1, *pair)] == [m.Applied(1)]
        assert torch.equal(shard.values[0], torch.full((4,), 3.0))
    assert part(shard, 0, 0, 100.0) == m.Held(0), "a part that comes after its gradient was used is only acknowledged"
    apply(shard, 2, Gradient(0, 0, 0))
    assert torch.equal(shard.values[0], torch.full((4,), 3.0))


def test_another_life_of_a_worker_does_not_add_to_what_the_first_began() -> None:
    shard = a_shard((0, 4), (1, 2))
    part(shard, 0, 0, 5.0, (0, 1), life=1)
    part(shard, 0, 0, 1.0, (0,), life=2)
    apply(shard, 1, Gradient(0, 0, 0))
    assert torch.equal(shard.values[0], torch.ones(4))
    assert torch.equal(shard.values[1], torch.zeros(2))


def test_a_pull_waits_for_its_version_and_keeps_what_it_was_given() -> None:
    shard = a_shard((0, 4))
    (now,) = shard.handle(b"p", 7, m.Pull(0, (0,)), ())
    for _ in range(2):  # asked again
        assert shard.handle(b"p", 8, m.Pull(1, (0,)), ()) == []
    part(shard, 0, 0, 2.0)
    applied, later = apply(shard, 1, Gradient(0, 0, 0))
    assert applied.message == m.Applied(1)
    assert (later.peer, later.request, later.message) == (b"p", 8, m.Values(1))
    assert torch.equal(now.frames[0], torch.zeros(4)), "the update does not change what is still being sent"
    assert torch.equal(later.frames[0], torch.full((4,), 2.0))


def test_the_state_of_a_shard_makes_another_that_goes_on_alike() -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.1)

    def schedule(stepper: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(stepper, 2, gamma=0.5)

    rule, _ = rule_of(optimizer, [torch.nn.Parameter(torch.zeros(6))], schedule)
    first, second = Shard(0, Memory()), Shard(0, Memory())
    text = json.dumps({"rule": rule.as_json(), "pieces": [[0, [6], "float32", 0]]})
    first.handle(b"w", 1, m.Create(text), [torch.arange(6.0)])
    for version in range(1, 4):
        part(first, 0, version, float(version))
        apply(first, version, Gradient(0, version, version - 1))
    told, tensors = first.state()
    second.load_state(json.loads(told), [tensor.clone() for tensor in tensors])
    for shard in (first, second):
        part(shard, 0, 4, 4.0)
        part(shard, 1, 0, 9.0)
        apply(shard, 4, Gradient(0, 4, 3), Gradient(1, 0, 0))
    assert torch.equal(first.values[0], second.values[0])
    assert second.version == 4


# ---------------------------------------------------------------------- the coordinator


def a_coordinator(policy: Policy, workers: int, shards: int = 1, **options: Any) -> Coordinator:
    coordinator = Coordinator(policy, workers, shards, **options)
    for worker in range(workers):
        coordinator.handle(b"%d" % worker, 1, m.Hello(worker, 10 + worker), ())
    return coordinator


def commit(
    coordinator: Coordinator, worker: int, sequence: int, version: int = 0, life: int | None = None
) -> list[Any]:
    message = m.Commit(worker, 10 + worker if life is None else life, sequence, version)
    return list(coordinator.handle(b"%d" % worker, 2, message, ()))


def told(results: list[Any], worker: int) -> list[Any]:
    return [result.message for result in results if isinstance(result, Answer) and result.peer == b"%d" % worker]


def orders(results: list[Any]) -> list[Order]:
    return [result for result in results if isinstance(result, Order)]


def test_nobody_starts_before_all_are_there() -> None:
    coordinator = Coordinator(Sync(), 2, 1)
    assert coordinator.handle(b"0", 1, m.Hello(0, 5), ()) == []
    assert coordinator.handle(b"0", 1, m.Hello(0, 5), ()) == [], "said again"
    results = coordinator.handle(b"1", 1, m.Hello(1, 6), ())
    assert [type(message) for message in told(results, 0)] == [m.Welcome, m.Released]
    assert [type(message) for message in told(results, 1)] == [m.Welcome, m.Released]
    (refused,) = coordinator.handle(b"x", 1, m.Hello(2, 6), ())
    assert refused.message == m.Failed("PolicyError", "worker 2 said hello; expected 0 to 1")


def test_a_commit_that_is_said_again_counts_once_and_an_old_life_is_refused() -> None:
    coordinator = a_coordinator(KAsync(1), 2, shards=3)
    first = commit(coordinator, 0, 0)
    assert told(first, 0) == [m.Committed(0), m.Released(1, 2, m.PLAIN)]
    assert [order.shard for order in orders(first)] == [0, 1, 2]
    assert told(commit(coordinator, 0, 0), 0) == [m.Committed(0)]
    assert coordinator.policy.version == 1
    coordinator.handle(b"0", 1, m.Hello(0, 77), ())
    (refused,) = told(commit(coordinator, 0, 1), 0)
    assert "worker 0 is not known in its life a; it has to say hello first" in refused.text
    assert coordinator.policy.version == 1
    commit(coordinator, 0, 1, life=77)
    assert coordinator.policy.version == 2


def test_orders_are_kept_until_they_are_answered_and_said_again_by_a_copy() -> None:
    coordinator = a_coordinator(KAsync(1), 2, shards=2)
    for sequence in range(3):
        commit(coordinator, 0, sequence)
    assert coordinator.first_open == (1, 1)
    for number in (1, 2):
        coordinator.answered(0, number)
    assert coordinator.first_open == (3, 1)
    copy = a_coordinator(KAsync(1), 2, shards=2)
    for sequence in range(3):
        commit(copy, 0, sequence)
    copy.forget_before(coordinator.first_open)
    again = copy.taken_over()
    assert [(order.shard, order.message.version) for order in orders(again)] == [(0, 3), (1, 1), (1, 2), (1, 3)]
    assert told(again, 0)[-1].version == 3


def test_a_snapshot_ends_once_all_shards_and_then_the_coordinator_have_written() -> None:
    coordinator = a_coordinator(Sync(), 1, 2, snapshots="/there", every=2)
    assert [type(order.message) for order in orders(commit(coordinator, 0, 0))] == [m.Apply, m.Apply]
    made = orders(commit(coordinator, 0, 1, 1))
    assert [type(order.message) for order in made] == [m.Apply, m.Apply, m.Write, m.Write]
    first, second = made[2:]
    assert first.message.version == 2
    assert coordinator.answered(first.shard, first.number) == []
    assert told(coordinator.handle(b"0", 3, m.Bye(0, 10, 1, ""), ()), 0) == [], "it waits for the snapshot"
    assert not coordinator.finished
    (last,) = coordinator.answered(second.shard, second.number)
    assert (last.folder, last.snapshot, last.number) == ("/there", first.message.snapshot, -1)
    assert told(coordinator.written(last.snapshot, ""), 0) == [m.Done()]
    assert coordinator.finished
    assert coordinator.report()["snapshot"] == 2


def test_a_snapshot_that_a_shard_could_not_write_is_told() -> None:
    coordinator = a_coordinator(Sync(), 1, 2)
    for failure in ("OSError: the disk is full", PASSED):
        first, second = orders(coordinator.handle(b"0", 7, m.Save("/there"), ()))
        assert coordinator.handle(b"0", 7, m.Save("/there"), ()) == [], "asked again"
        (said,) = told(coordinator.answered(second.shard, second.number, failure), 0)
        assert coordinator.answered(first.shard, first.number) == []
        if failure == PASSED:
            assert said == m.Saved(-1)
        else:
            assert said.text == f"there is no snapshot of version 0: shard 1: {failure}"
            assert coordinator.report()["snapshot_failure"] == f"version 0: shard 1: {failure}"


def test_those_who_attend_are_told_of_the_end_once_they_have_left_themselves() -> None:
    coordinator = a_coordinator(Sync(), 1)
    assert coordinator.handle(b"g", 5, m.Attend(0, 77), ()) == []
    assert told(coordinator.handle(b"0", 3, m.Bye(0, 10, 1, ""), ()), 0) == [], "one attends still"
    assert not coordinator.abandoned
    results = coordinator.handle(b"g", 6, m.Bye(0, 77, 0, ""), ())
    assert sorted((result.peer, result.request) for result in results) == [(b"0", 3), (b"g", 5), (b"g", 6)]
    assert coordinator.finished
    again = coordinator.handle(b"g", 5, m.Attend(0, 77), ())
    assert [(answer.peer, answer.request) for answer in again] == [(b"g", 5)], "its answer was lost"
    assert coordinator.finished
    coordinator.handle(b"h", 5, m.Attend(0, 78), ())
    coordinator.handle(b"", 0, m.Left(0, 78, "its process ended"), ())
    assert coordinator.finished


def test_a_part_that_is_said_again_does_not_replace_what_came_later() -> None:
    """A second backward pushes a part anew; the repetition of the first one may come from memory that has changed."""
    shard = a_shard((0, 4))
    for request, value in ((2, 1.0), (5, 2.0), (2, 99.0), (5, 99.0)):
        shard.handle(b"w", request, m.Part(0, 1, 0, 0, (0,), ()), [torch.full((4,), value)])
    apply(shard, 1, Gradient(0, 0, 0))
    assert torch.equal(shard.values[0], torch.full((4,), 2.0))


def test_a_copy_forgets_a_snapshot_that_was_written_and_goes_on_with_one_that_was_not() -> None:
    coordinator = a_coordinator(Sync(), 1, 2)
    first, second = orders(coordinator.handle(b"0", 7, m.Save("/there"), ()))
    coordinator.forget_before((first.number + 1, second.number))
    assert second in coordinator.taken_over()
    (last,) = coordinator.answered(second.shard, second.number)
    assert last.snapshot == second.message.snapshot
    assert told(coordinator.written(last.snapshot, ""), 0) == [m.Saved(0)]
    coordinator.handle(b"0", 8, m.Save("/there"), ())
    coordinator.forget_before((100, 100))
    assert not coordinator.saving


def test_a_shard_writes_only_the_version_that_is_asked_for() -> None:
    shard = a_shard((0, 4))
    assert shard.handle(b"c", 5, m.Write(1, "/there", "s"), ()) == [], "it is not there yet: asked again"
    part(shard, 0, 0, 2.0)
    apply(shard, 1, Gradient(0, 0, 0))
    (written,) = shard.handle(b"c", 5, m.Write(1, "/there", "s"), ())
    assert (written.folder, written.snapshot, written.number) == ("/there", "s", 0)
    assert torch.equal(written.tensors[0], torch.full((4,), 2.0))
    (late,) = shard.handle(b"c", 5, m.Write(0, "/there", "s"), ())
    assert late.message == m.Written(0, PASSED)
    done, shown = shard.handle(b"c", 6, m.Show(1, "w0/1", 9), ())
    assert done.message == m.Done()
    assert (shown.peer, shown.request) == (b"w0/1", 9)
    assert json.loads(shown.message.text)["version"] == 1


def test_cancelled_workers_are_released_and_their_late_gradients_dropped() -> None:
    coordinator = a_coordinator(KSync(1), 2)
    results = commit(coordinator, 0, 0)
    assert told(results, 1) == [m.Released(1, 2, m.CANCELLED)]
    late = commit(coordinator, 1, 0)
    assert told(late, 1) == [m.Committed(0)]
    assert orders(late)[0].message == m.Discard((Gradient(1, 0, 0),))
    assert coordinator.report()["dropped"] == 1


def test_the_training_is_over_after_its_updates_and_when_too_many_are_done() -> None:
    coordinator = a_coordinator(KAsync(1), 2, updates=1)
    results = commit(coordinator, 1, 0)
    assert told(results, 0)[-1].how == told(results, 1)[-1].how == m.OVER
    assert told(commit(coordinator, 0, 0), 0) == [m.Committed(0)], "what comes later is not used"
    assert coordinator.policy.version == 1
    coordinator = a_coordinator(KAsync(2), 2)
    results = list(coordinator.handle(b"0", 3, m.Bye(0, 10, 0, ""), ()))
    assert told(results, 1)[-1].how == m.OVER
    assert not coordinator.finished
    coordinator.handle(b"1", 3, m.Bye(1, 11, 0, ""), ())
    assert coordinator.finished


def test_another_worker_gives_the_values_that_the_first_did_not_live_to_give() -> None:
    coordinator = a_coordinator(KAsync(1), 3)
    text = json.dumps({"rule": ADD.as_json(), "tensors": [["a", [5], "float32", 0, ""]]})
    (placed,) = coordinator.handle(b"0", 4, m.Declare(0, text), ())
    assert placed.message.create == 1
    assert coordinator.handle(b"1", 5, m.Declare(1, text), ()) == []
    left = coordinator.left(0, 10, "was killed")
    (heir,) = told(left, 1)
    assert heir.create == 1
    assert coordinator.handle(b"2", 6, m.Declare(2, text), ()) == []
    created = coordinator.handle(b"1", 7, m.Created(1), ())
    assert told(list(created), 2)[0].create == 0


@pytest.mark.parametrize("data", [None, {}, {"kind": "SGD"}, {"kind": "Tensor", "groups": [], "schedule": None}])
def test_rules_that_torch_does_not_have_are_refused(data: Any) -> None:
    with pytest.raises(PolicyError, match="no update rule"):
        Rule.from_json(data)


def test_schedules_that_cannot_be_described_are_refused() -> None:
    def schedule(stepper: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1 / (1 + step))

    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(PolicyError, match="LambdaLR: this schedule cannot be described"):
        rule_of(lambda given: torch.optim.SGD(given, lr=1.0), [weight], schedule)
    with pytest.raises(PolicyError, match="the optimizer was not given 1 of 2 parameters"):
        rule_of(
            lambda given: torch.optim.SGD(list(given)[:1], lr=1.0), [weight, torch.nn.Parameter(torch.zeros(1))], None
        )
