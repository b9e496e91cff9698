"""Fitting costs to measured times, and keeping them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ringred.collectives.registry import lookup
from ringred.runtime.select import candidates, choose, machine_model, share_bounds
from ringred.schedule.cost import simulate
from ringred.topology.calibrate import Sample, fit, load, store

ALPHA, BETA, GAMMA, LATENCY, CALL = 12e-6, 0.11e-9, 0.07e-9, 40e-6, 5e-6
UNITS = [(1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)]


def samples(noise: float, size: int, latency: float) -> list[Sample]:
    """What algorithms of all kinds would take with those costs."""
    generator = random.Random(1)
    found = []
    for name in ("one_shot", "direct", "halving_doubling"):
        entry = lookup("all_reduce", name)
        group = entry.group(size)
        for nbytes in (64, 1 << 16, 1 << 20, 1 << 22):
            bounds = share_bounds(nbytes, entry.units(group))
            counts = [
                simulate(size, entry.steps(group), bounds, lambda s, r, link=(a, b, d): link, g).seconds
                for a, b, g, d in UNITS
            ]
            exact = sum(count * cost for count, cost in zip(counts, (ALPHA, BETA, GAMMA, latency), strict=True))
            found.append(Sample(*counts, 1, (exact + CALL) * generator.uniform(1 - noise, 1 + noise)))
    return found


def test_finds_the_costs_that_made_the_times() -> None:
    assert fit(samples(0.0, 4, LATENCY)) == pytest.approx((ALPHA, BETA, GAMMA, LATENCY, CALL))
    noisy = fit(samples(0.1, 4, LATENCY))
    assert noisy[0] + noisy[3] + noisy[4] == pytest.approx(ALPHA + LATENCY + CALL, rel=0.2)
    assert noisy[1] + noisy[2] == pytest.approx(BETA + GAMMA, rel=0.2)


def test_what_no_sample_tells_apart_is_shared_out() -> None:
    alpha, beta, gamma, latency, call = fit(samples(0.0, 2, 0.0))  # two ranks: every message is a round of its own
    assert (alpha + latency, beta, gamma, call) == pytest.approx((ALPHA, BETA, GAMMA, CALL))


def test_many_rounds_never_look_as_cheap_as_one() -> None:
    noisy = [Sample(0, 0, 0, rounds, 1, 4e-5) for rounds in (1, 2, 4)]
    *_, latency, call = fit(noisy)
    assert (latency, call) == pytest.approx((2e-6, 3.8e-5))


def test_reducing_never_looks_free_within_a_host() -> None:
    noisy = [
        Sample(1, nbytes, reduced, 1, 1, 1e-6 + nbytes * 1e-10) for nbytes in (1 << 16, 1 << 22) for reduced in (1, 2)
    ]
    _, beta, gamma, *_ = fit(noisy)
    assert (beta, gamma) == pytest.approx((1e-10, 0.0))
    _, beta, gamma, *_ = fit(noisy, within_host=True)
    assert (beta, gamma) == pytest.approx((0.9e-10, 0.1e-10))


def test_all_at_once_does_not_look_faster_where_a_share_is_just_one_segment() -> None:
    model = machine_model("shm", (0, 0), {"tensor": (7e-7, 3e-11, 3e-11, 7e-7, 0.0)})
    for megabytes in (1, 2, 4, 8):
        assert choose("all_reduce", megabytes << 20, model)[0].name == "direct"


def test_no_cost_is_negative_whatever_was_measured() -> None:
    strange = [Sample(1, 1000, 1000, 1, 1, 1e-5), Sample(1, 10000, 10000, 1, 1, 5e-6), Sample(2, 10, 5, 2, 1, 1e-6)]
    assert all(cost >= 0 for cost in fit(strange))
    assert fit([]) == (0.0,) * 5


def test_what_no_sample_has_costs_nothing() -> None:
    native = [Sample(1, nbytes, 0, 0, 0, 2e-6 + nbytes * 1e-10) for nbytes in (64, 1 << 16, 1 << 22)]
    assert fit(native) == pytest.approx((2e-6, 1e-10, 0.0, 0.0, 0.0))


def test_is_kept_for_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "tuning.json"
    assert load(path, "here") is None
    assert store(path, "here", {"tensor": (1e-6, 2e-9, 3e-9, 4e-6, 5e-6)}) is None
    assert store(path, "there", {"window": (4e-6, 0.0, 1e-9, 0.0, 0.0)}) is None
    assert load(path, "here") == {"tensor": (1e-6, 2e-9, 3e-9, 4e-6, 5e-6)}
    assert load(path, "there") == {"window": (4e-6, 0.0, 1e-9, 0.0, 0.0)}
    assert [found.name for found in path.parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"here": 3}',
        '{"here": {"tensor": [1]}}',
        '{"here": {"tensor": "abc"}}',
        '{"here": {"tensor": [1e-6, NaN, 0, 0, 0]}}',
        '{"here": {"tensor": [1e-6, -1, 0, 0, 0]}}',
        '{"here": {"disk": [1, 1, 1, 1, 1]}}',
    ],
)
def test_a_file_that_makes_no_sense_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    assert load(path, "here") is None
    assert store(path, "here", {"tensor": (1e-6, 2e-9, 3e-9, 4e-6, 5e-6)}) is None
    assert load(path, "here") == {"tensor": (1e-6, 2e-9, 3e-9, 4e-6, 5e-6)}


def test_says_why_it_could_not_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trouble = store(tmp_path / "file" / "tuning.json", "here", {})
    assert trouble is not None
    assert "file" in trouble


def test_measured_costs_decide() -> None:
    slow_to_start = {"tensor": (1e-3, 1e-10, 1e-10, 0.0, 0.0)}
    slow_to_move = {"tensor": (1e-9, 1e-8, 1e-8, 0.0, 0.0)}
    assert choose("all_reduce", 1 << 20, machine_model("shm", (0, 0, 0), slow_to_start))[1].name == "one_shot"
    assert choose("all_reduce", 1 << 20, machine_model("shm", (0, 0, 0), slow_to_move))[1].name == "direct"
    model = machine_model("shm", (0, 0), {"tensor": (1e-5, 1e-10, 1e-10, 0.0, 0.0)})
    names = [candidate.name for candidate in candidates("all_reduce", 2, 64, model, native=(2e-6, 1e-9, 0.0, 0.0, 0.0))]
    assert names[0] == "native"
    assert choose("all_reduce", 1 << 24, model, native=(2e-6, 1e-9, 0.0, 0.0, 0.0))[1].name != "native"


def test_a_latency_favours_those_who_talk_to_all_at_once() -> None:
    in_turn = machine_model("shm", (0,) * 4, {"tensor": (8e-5, 1e-10, 1e-10, 0.0, 0.0)})
    at_once = machine_model("shm", (0,) * 4, {"tensor": (5e-6, 1e-10, 1e-10, 8e-5, 0.0)})
    assert choose("all_reduce", 1 << 20, in_turn)[1].name == "halving_doubling"
    assert choose("all_reduce", 1 << 20, at_once)[1].name == "direct"


def test_between_hosts_many_do_not_send_to_one_at_once() -> None:
    """As measured there: `direct` fills a port less well than its bytes say."""
    for hosts in (4, 8):
        chosen = [
            choose("all_reduce", mib << 20, machine_model("torch_p2p", tuple(range(hosts))))[1] for mib in (1, 4, 16)
        ]
        assert {candidate.name for candidate in chosen} <= {"ring", "halving_doubling"}
