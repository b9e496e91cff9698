"""The laboratory's models and predictions; its hosts are tried in tests/procs/test_lab.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lab import costs, experiments, predict, published, record, scale
from lab.network import Network
from lab.profiles import MODELS, profile, read
from lab.served import served_seconds

from ringred.parameter_server.policies import parse

COSTS = predict.Costs(1e-4, 1e-8, 0.0, 0.0, 0.0, 1 << 20)


def test_models_have_the_parameters_of_the_papers() -> None:
    assert profile("alexnet").elements == 61_100_840
    assert profile("vgg16").elements == 138_357_544
    assert profile("resnet50").elements == 25_557_032
    assert profile("resnet101").elements == 44_549_160
    assert profile("bert").elements == pytest.approx(109.5e6, rel=0.01)
    assert profile("inception").elements == pytest.approx(23.8e6, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_buckets_are_full_in_the_order_in_which_they_are_reduced(name: str) -> None:
    model = profile(name)
    step = predict.step_of(model, 10.0, "ring", COSTS, Network(4, 800))
    assert sorted(at for layers in predict.buckets_of(model) for at in layers) == list(range(len(model.layers)))
    assert list(step.ready) == sorted(step.ready)
    assert all(ready <= begin <= end for ready, (begin, end) in zip(step.ready, step.times, strict=True))
    assert step.seconds >= 10 * model.seconds
    assert step.exposed == pytest.approx(step.seconds - 10 * model.seconds)


def test_one_server_takes_half_as_many_times_as_long_as_a_ring_as_there_are_hosts() -> None:
    """N (P-1) bytes go into its port while as many come out; on a ring 2 N (P-1)/P go through each."""
    ring, central = (predict.all_reduce_seconds(way, 64 << 20, COSTS, Network(8, 800)) for way in ("ring", "central"))
    assert central / ring == pytest.approx(4, rel=0.05)


def test_a_slow_uplink_is_shared_by_its_rack() -> None:
    racks = Network(8, 1000, racks=2, uplink_mbit=250)
    assert [racks.rack_of(host) for host in range(8)] == [0] * 4 + [1] * 4
    flat, slow = (predict.all_reduce_seconds("direct", 8 << 20, COSTS, on) for on in (Network(8, 1000), racks))
    ring = predict.all_reduce_seconds("ring", 8 << 20, COSTS, racks)
    assert slow > 5 * flat, "each host of a rack sends half of its data over the uplink"
    assert ring < slow, "of a ring one host of each rack does"


def test_a_slow_port_holds_a_ring_up_by_its_whole_share() -> None:
    even, slow = Network(4, 1000), Network(4, 1000, slow_mbit=250)
    assert [slow.mbit_of(host) for host in range(4)] == [1000, 1000, 1000, 250]
    times = [predict.all_reduce_seconds("ring", 64 << 20, COSTS, network) for network in (even, slow)]
    assert times[1] / times[0] == pytest.approx(4, rel=0.1)


def test_a_straggler_takes_its_time_and_everybody_waits() -> None:
    model = profile("graph")
    steps = [predict.step_of(model, 10.0, "ring", COSTS, Network(4, 800), slowness=slow) for slow in (1.0, 1.5)]
    assert steps[1].seconds - steps[0].seconds == pytest.approx(5 * model.seconds, rel=0.05)


def test_many_ranks_keep_less_of_a_step_by_one_server_than_by_a_ring() -> None:
    found = {(one.model, one.way): one.efficiency for part in scale.scaled((12,)) for one in part}
    assert len(found) == len(MODELS) * len(scale.WAYS)
    for model in MODELS:
        assert 0 < found[model, "central"] <= found[model, "ring"] <= 1
        assert found[model, "tree"] <= found[model, "double_tree"]
        assert found[model, "double_tree"] > 0.6 * found[model, "ring"], "it sends 2 N bytes, and a few segments more"
    # 2 N (P-1) bytes through a ring's port, after what little of backward is left: 138 M parameters at 10 Gbit/s.
    alone, line = profile("vgg16").seconds, 2 * 11 / 12 * profile("vgg16").nbytes / 1.25e9
    assert alone / (alone + line) < found["vgg16", "ring"] < alone / max(alone, line)


@pytest.mark.parametrize("way", ["ring", "halving_doubling", "torus"])
def test_copying_by_shared_processors_hides_behind_the_line(way: str) -> None:
    """Each byte is copied twice, by the two processors that four hosts share: 12 N 0.2 β / 2 = 1.2 N β, four fifths of
    the line's 1.5 N β. Messages that wait for their receives are not copied before, which would keep others waiting."""
    for posted in (False, True):
        costs_ = replace(COSTS, segment=512 << 10, cores=2, copy=0.2 * COSTS.beta, posted=posted)
        seconds = predict.all_reduce_seconds(way, 96 << 20, costs_, Network(4, 800))
        assert seconds == pytest.approx(1.5 * (96 << 20) * COSTS.beta, rel=0.06)


def test_costs_are_found_again_from_samples_that_they_explain() -> None:
    network, known = Network(4, 800), predict.Costs(4e-5, 1e-8, 0.0, 2e-5, 5e-5, 1 << 20, 2, 1e-9, 1.5)
    samples = [
        {
            "name": name,
            "ranks": 4,
            "nbytes": nbytes,
            "seconds": predict.all_reduce_seconds(name, nbytes, known, network),
        }
        for name in ("ring", "halving_doubling", "direct", "tree")
        for nbytes in (1 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20)
    ]
    long = [{"name": "ring", "ranks": 2, "nbytes": n, "seconds": 1e-3 + 1e-8 * n} for n in (4 << 20, 12 << 20)]
    run = {"samples": samples + long, "segment": 1 << 20, "tuning": {"tensor": (1e-4, 1e-8, 0.0, 0.0, 0.0)}}
    found = costs.fitted([run], network, 2)
    assert found.beta == pytest.approx(1e-8)
    for sample in samples:
        again = predict.all_reduce_seconds(str(sample["name"]), int(sample["nbytes"]), found, network)
        assert again == pytest.approx(sample["seconds"], rel=0.1)


def test_a_recorded_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    recorded = record.record("small", record.load("mlp"))
    record.write(tmp_path / "small.json", recorded)
    again = read(str(tmp_path / "small.json"))
    assert again == recorded
    assert again.nbytes == 4 * sum(parameter.numel() for parameter in record.load("mlp").parameters())
    assert again.seconds == pytest.approx(sum(again.recorded))
    assert again.layers[0].name == "model.0.weight"
    with pytest.raises(SystemExit, match=r"expected mlp, cnn, or FILE.py:FUNCTION"):
        record.load("nothing.py:make")


def test_every_experiment_names_cases_that_there_are() -> None:
    for experiment in experiments.EXPERIMENTS.values():
        for network in experiment.networks:
            for case in [] if experiment.cases is None else experiment.cases(network):
                kind, _, name = case.model.rpartition(":")
                assert name in (record.REAL if kind else MODELS)
                policy = case.way.partition(":")[2]
                assert not policy or parse(policy)
                assert policy or case.way in ("alone", "gloo", "auto") or predict.lookup("all_reduce", case.way)
                assert case.way != "native" or experiment.by == "mpi"


def test_a_straight_line_tells_the_time_of_any_size() -> None:
    topology = COSTS.topology(Network(12, 800))
    group = predict.lookup("all_reduce", "torus").group(12, grid=(4, 3))
    seconds_of = predict.linear("torus", group, topology, 12 << 20, 96 << 20)
    steps = predict.lookup("all_reduce", "torus").steps(group)
    job = predict.Job(steps, predict.share_bounds(48 << 20, 12), [0.0] * 12)
    simulated, _ = predict.simulate_jobs(12, [job], topology.link, 0.0)
    assert seconds_of(48 << 20) == pytest.approx(simulated.seconds, rel=1e-3)


def test_what_is_fitted_to_print_gives_print_and_the_rest_is_predicted() -> None:
    fit = published.fitted()
    assert [published.simulated(row, fit) for row in published.CALIBRATION] == pytest.approx([90.0, 79.0], abs=0.3)
    assert 0 < fit.overhead < 0.2
    goyal = next(row for row in published.PUBLISHED if row.work.startswith("Goyal"))
    ideal = published.simulated(goyal, published.Fit(0.0, 1.0))
    assert published.simulated(goyal, fit) < ideal <= 100


def test_a_port_that_several_send_to_at_once_is_slower_by_its_factor() -> None:
    both, network = (COSTS, replace(COSTS, crowded=1.5)), Network(4, 800)

    def factor(way: str, nbytes: int) -> float:
        alike, crowded = (predict.all_reduce_seconds(way, nbytes, costs_, network) for costs_ in both)
        return crowded / alike

    assert factor("ring", 8 << 20) == 1, "on a ring each port has one sender"
    assert 1.2 < factor("central", 2 << 20) < 1.5, "at least half of its time they send to one"
    assert 1 < factor("central", 256 << 20) < 1.02, "in the long run they come to terms"


def test_messages_that_wait_for_their_receives_leave_a_port_to_the_one_that_is_expected() -> None:
    """The root of a tree expects one child's data, then the other's, which it passes on at once: N + 2N go through its
    port where 2N + 2N do if both children send as soon as they can."""
    both = (COSTS, replace(COSTS, posted=True))
    eager, posted = (predict.all_reduce_seconds("tree", 64 << 20, costs_, Network(4, 800)) for costs_ in both)
    assert posted / eager == pytest.approx(0.75, rel=0.05)


def test_ranks_of_one_host_pass_no_port() -> None:
    tuning = {"tensor": (0.0, 1e-10, 0.0, 0.0, 0.0), "between": (1e-4, 1e-8, 0.0, 0.0, 0.0)}
    both = replace(COSTS, tuning=tuning)
    hosts, ranks = Network(4, 800), Network(4, 800, each=2)
    assert ranks.host_of_rank == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ranks.times(2.0, 1.5) == [2.0] * 6 + [3.0] * 2
    flat = predict.all_reduce_seconds("ring", 64 << 20, both, hosts)
    for way in ("hierarchical", "torus", "auto"):
        assert predict.all_reduce_seconds(way, 64 << 20, both, ranks) == pytest.approx(flat, rel=0.05)
    assert predict.all_reduce_seconds("ring", 64 << 20, both, ranks) / flat == pytest.approx(7 / 6, rel=0.05)


def test_servers_take_what_their_busiest_port_takes() -> None:
    model, network = profile("resnet50"), Network(4, 800)
    one, each = (served_seconds(way, model, 0.0, COSTS, network) for way in ("server:sync", "servers:sync"))
    assert each == pytest.approx(2 * 3 / 4 * model.nbytes * COSTS.beta, rel=0.05), "N (P-1)/P in, and out"
    assert one / each == pytest.approx(4, rel=0.05)
    ranks = replace(COSTS, tuning={"tensor": (0.0, 1e-10, 0.0, 0.0, 0.0), "between": (1e-4, 1e-8, 0.0, 0.0, 0.0)})
    by_host = served_seconds("hosts:sync", model, 0.0, ranks, Network(4, 800, each=2))
    assert by_host == pytest.approx(each, rel=0.1), "a host's ranks send what one rank does"


def test_encryption_takes_time_of_the_processors_that_the_hosts_share() -> None:
    model, network = profile("resnet50"), Network(4, 800)
    plain = replace(COSTS, cores=2, copy=COSTS.beta / 100)
    encrypted = replace(plain, cipher=COSTS.beta)
    sealed, opened = 6 * model.nbytes, 6 * model.nbytes
    for way in ("servers:sync", "servers:async"):
        seconds = served_seconds(way, model, 0.0, encrypted, network)
        assert seconds == pytest.approx((sealed + opened) * COSTS.beta / 2, rel=0.1)
        assert seconds > 1.9 * served_seconds(way, model, 0.0, plain, network)


def test_an_asynchronous_worker_beside_the_only_server_does_not_wait_for_the_port() -> None:
    model, network = profile("resnet50"), Network(4, 800)
    away = 3 / (3 * model.nbytes * COSTS.beta)  # mini-batches a second of the three that share its port
    seconds = served_seconds("server:async", model, 1.0, COSTS, network)
    assert seconds == pytest.approx(4 / (away + 1 / model.seconds), rel=0.01)
    # It has one thread to encrypt for the others, however many processors there are.
    sealed = served_seconds("server:async", model, 1.0, replace(COSTS, cipher=COSTS.beta), network)
    assert sealed == pytest.approx(4 / (away / 2 + 1 / model.seconds), rel=0.01)


def test_who_waits_for_whom_decides_what_a_straggler_costs() -> None:
    model, network = profile("graph"), Network(4, 800)

    def seconds(way: str, slowness: float) -> float:
        return served_seconds(way, model, 20.0, COSTS, network, slowness)

    assert seconds("servers:sync", 1.5) - seconds("servers:sync", 1.0) == pytest.approx(10 * model.seconds, rel=0.05)
    assert seconds("servers:k_sync:3", 1.5) == seconds("servers:k_sync:3", 1.0) == seconds("servers:sync", 1.0) * 4 / 3
    a_quarter_is_slower = seconds("servers:async", 1.5) / seconds("servers:async", 1.0)
    assert a_quarter_is_slower == pytest.approx(1 / (3 / 4 + 1 / 4 / 1.5), rel=0.05)


def test_a_network_says_which_congestion_control_this_kernel_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual, other = Network(2, 100), Network(2, 100, control="bbr")
    assert str(other) == "2 hosts of 100 Mbit/s, TCP's bbr"
    assert str(Network(4, 250, dilation=4)) == "4 hosts of 250 Mbit/s (1 Gbit/s, 4 times slower)"
    monkeypatch.setattr("lab.network._CONTROLS", tmp_path / "controls")
    assert usual.unavailable == "this kernel has no cubic (modprobe tcp_cubic)"
    (tmp_path / "controls").write_text("reno cubic\n")
    assert usual.unavailable is None
    assert other.unavailable == "this kernel has no bbr (modprobe tcp_bbr)"
