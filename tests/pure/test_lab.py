"""The laboratory's models and predictions; its hosts are tried in tests/procs/test_lab.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab import predict, published
from lab.hosts import Network
from lab.profiles import MODELS, profile

COSTS = predict.Costs(1e-4, 1e-8, 0.0, 0.0, 0.0, 1 << 20)


def test_models_have_the_parameters_of_the_papers() -> None:
    assert profile("alexnet").elements == 61_100_840
    assert profile("vgg16").elements == 138_357_544
    assert profile("resnet50").elements == 25_557_032
    assert profile("bert").elements == pytest.approx(109.5e6, rel=0.01)
    assert profile("inception").elements == pytest.approx(23.8e6, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_buckets_are_full_in_the_order_in_which_they_are_reduced(name: str) -> None:
    model = profile(name)
    step = predict.step_of(model, 10.0, "ring", 4, COSTS)
    assert sorted(at for layers in predict.buckets_of(model) for at in layers) == list(range(len(model.layers)))
    assert list(step.ready) == sorted(step.ready)
    assert all(ready <= begin <= end for ready, (begin, end) in zip(step.ready, step.times, strict=True))
    assert step.seconds >= 10 * model.seconds
    assert step.exposed == pytest.approx(step.seconds - 10 * model.seconds)


def test_one_server_takes_half_as_many_times_as_long_as_a_ring_as_there_are_hosts() -> None:
    """N (P-1) bytes go into its port while as many come out; on a ring 2 N (P-1)/P go through each."""
    ring, central = (predict.all_reduce_seconds(way, 8, 64 << 20, COSTS) for way in ("ring", "central"))
    assert central / ring == pytest.approx(4, rel=0.05)


def test_a_slow_uplink_is_shared_by_its_rack() -> None:
    racks = Network(8, 1000, racks=2, uplink_mbit=250)
    ports = predict.uplinks(racks, COSTS)
    assert [racks.rack_of(host) for host in range(8)] == [0] * 4 + [1] * 4
    flat, slow = (predict.all_reduce_seconds("direct", 8, 8 << 20, COSTS, p) for p in (None, ports))
    ring = predict.all_reduce_seconds("ring", 8, 8 << 20, COSTS, ports)
    assert slow > 5 * flat, "each host of a rack sends half of its data over the uplink"
    assert ring < slow, "of a ring one host of each rack does"


def test_a_straight_line_tells_the_time_of_any_size() -> None:
    topology = COSTS.topology(12)
    group = predict.lookup("all_reduce", "torus").group(12, grid=(4, 3))
    seconds_of = predict.linear("torus", group, topology, 12 << 20, 96 << 20)
    steps = predict.lookup("all_reduce", "torus").steps(group)
    job = predict.Job(steps, predict.share_bounds(48 << 20, 12), [0.0] * 12)
    simulated, _ = predict.simulate_jobs(12, [job], topology.link, 0.0)
    assert seconds_of(48 << 20) == pytest.approx(simulated.seconds, rel=1e-3)


def test_the_larger_scale_the_lower_efficiency() -> None:
    goyal = published.PUBLISHED[0]
    found = published.simulated(goyal)
    assert 60 < found < 100
