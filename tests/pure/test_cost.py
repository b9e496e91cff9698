"""The simulator replays the proved steps, and gives what the field's formulas give."""

from __future__ import annotations

from dataclasses import replace
from math import log2, prod

import pytest

from ringred.collectives.registry import algorithms, lookup
from ringred.runtime.select import candidates, predict, segments_for, share_bounds
from ringred.schedule import closed_forms
from ringred.schedule.alike import simulate_alike
from ringred.schedule.cost import Job, simulate
from ringred.schedule.ir import Recv, Send, unit
from ringred.schedule.network import Port, simulate_jobs
from ringred.topology.model import flat, grid_links, hosts
from ringred.topology.torus import factorisations

ALPHA, BETA, GAMMA = 17e-6, 0.37e-9, 0.11e-9
# Divisible by every number of ranks tried, so that shares are equal and formulas exact.
NBYTES = 5040 * 64 * 11 * 13 * 17


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 32, 64])
@pytest.mark.parametrize("name", ["ring", "halving_doubling", "tree", "direct", "central", "torus"])
def test_equals_the_closed_form(name: str, size: int) -> None:
    entry = lookup("all_reduce", name)
    group = entry.group(size)
    form = closed_forms.all_reduce(name, group, NBYTES, ((ALPHA, BETA),), GAMMA)
    if form is None:
        assert name in ("tree", "halving_doubling")
        assert size & (size - 1), "only the trees have no formula, and only away from powers of two"
        return
    cost = predict(entry, group, NBYTES, flat(size, ALPHA, BETA, GAMMA))
    assert cost.seconds == pytest.approx(form.seconds, rel=1e-9)
    assert cost.messages == form.messages
    assert cost.bytes_sent == pytest.approx(form.data_sent * NBYTES, rel=1e-9)


@pytest.mark.parametrize("size", [4, 6, 12, 16, 24, 30])
def test_torus_equals_its_closed_form_with_other_links_along_each_dimension(size: int) -> None:
    entry = lookup("all_reduce", "torus")
    links = ((ALPHA, BETA), (3 * ALPHA, 7 * BETA), (10 * ALPHA, 2 * BETA), (ALPHA, 5 * BETA))
    for grid in factorisations(size):
        group = entry.group(size, grid=grid)
        form = closed_forms.all_reduce("torus", group, NBYTES, links, GAMMA)
        cost = predict(entry, group, NBYTES, grid_links(grid, links[: len(grid)], GAMMA))
        assert form is not None
        assert cost.seconds == pytest.approx(form.seconds, rel=1e-9), grid
        # Whatever the grid: 2(P−1)/P of the data, in Σ2(d−1) messages.
        assert cost.messages == sum(2 * (extent - 1) for extent in grid)
        assert cost.bytes_sent * size == 2 * (size - 1) * NBYTES


def test_messages_on_32_by_32_are_124_and_on_a_ring_of_1024_2046() -> None:
    torus, ring = lookup("all_reduce", "torus"), lookup("all_reduce", "ring")
    assert predict(torus, torus.group(1024), 1 << 20, flat(1024, ALPHA, BETA, GAMMA)).messages == 124
    assert sum(len(step) == 2 for step in ring.steps(ring.group(1024))(0)) == 2046


@pytest.mark.parametrize("size", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("segments", [1, 2, 7, 40])
def test_a_chain_of_segments_equals_its_closed_form(size: int, segments: int) -> None:
    entry = lookup("broadcast", "chain")
    nbytes = segments * 1000
    cost = simulate(
        size, entry.steps(entry.group(size)), [(0, nbytes)], lambda a, b: (ALPHA, BETA), GAMMA, segment=1000
    )
    expected = closed_forms.pipelined_chain(size, nbytes, segments, (ALPHA, BETA))
    assert cost.seconds == pytest.approx(expected, rel=1e-9)


def test_whole_and_segmented_replay_agree_where_nothing_is_cut() -> None:
    for name in ("ring", "torus", "tree", "halving_doubling", "direct", "one_shot", "central"):
        entry = lookup("all_reduce", name)
        group = entry.group(6)
        topology = flat(6, ALPHA, BETA, GAMMA)
        whole = predict(entry, group, NBYTES, topology)
        assert predict(entry, group, NBYTES, topology, segment_bytes=NBYTES).seconds == pytest.approx(whole.seconds)


@pytest.mark.parametrize("size", [4, 15, 16, 63])
def test_double_tree_comes_near_its_bound_once_segments_fill_the_pipeline(size: int) -> None:
    entry = lookup("all_reduce", "double_tree")
    nbytes, gamma = 1 << 28, 0.0
    seconds = [
        predict(entry, entry.group(size, segments=k), nbytes, flat(size, 1e-6, BETA, gamma)).seconds for k in (1, 64)
    ]
    bound = 2 * nbytes * BETA
    assert bound * 0.75 <= seconds[1] < bound * 1.35
    assert seconds[0] > 1.4 * seconds[1]
    tree = predict(lookup("all_reduce", "tree"), entry.group(size), nbytes, flat(size, 1e-6, BETA, gamma))
    if size >= 15:
        assert tree.seconds > log2(size) * 0.4 * seconds[1]


def test_between_hosts_a_hierarchy_sends_a_share_where_leaders_send_all() -> None:
    """The inter-host term of X ranks on each of Y hosts: 2(Y−1)/Y·(N/X)β, X times less than with leaders."""
    ranks, count = 4, 3
    model = hosts([host for host in range(count) for _ in range(ranks)], (0.0, 0.0), (0.0, BETA), 0.0)
    entry = lookup("all_reduce", "hierarchical")
    cost = predict(entry, entry.group(12, grid=(ranks, count)), NBYTES, model)
    assert cost.seconds == pytest.approx(2 * (count - 1) / count * NBYTES / ranks * BETA, rel=1e-9)


def test_segments_follow_the_size() -> None:
    assert [segments_for(nbytes, 1 << 20) for nbytes in (0, 1, 2 << 20, 3 << 20, 1 << 30)] == [1, 1, 1, 2, 64]


def test_shares_are_as_equal_as_can_be() -> None:
    assert share_bounds(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert share_bounds(1, 3) == [(0, 0), (0, 0), (0, 1)]


def test_many_ranks_consider_only_what_sends_few_messages() -> None:
    model = flat(80, ALPHA, BETA, GAMMA)
    names = {candidate.name for candidate in candidates("all_reduce", 80, 1 << 20, model)}
    assert names == {"tree", "double_tree", "halving_doubling", "torus", "hierarchical"}
    assert [candidate.name for candidate in candidates("reduce_scatter", 80, 1 << 20, model)] == ["torus"]


@pytest.mark.parametrize(("name", "rounds"), [("one_shot", 1), ("direct", 2), ("halving_doubling", 6), ("ring", 14)])
def test_messages_of_one_step_share_the_latency(name: str, rounds: int) -> None:
    entry = lookup("all_reduce", name)
    group = entry.group(8)
    bounds = [(unit, unit + 1) for unit in range(entry.units(group))]
    assert simulate(8, entry.steps(group), bounds, lambda a, b: (0.0, 0.0, 1.0), 0.0).seconds == rounds
    # ... and what a port takes for each of them comes after it.
    both = simulate(8, entry.steps(group), bounds, lambda a, b: (ALPHA, 0.0, 1.0), 0.0).seconds
    alone = simulate(8, entry.steps(group), bounds, lambda a, b: (ALPHA, 0.0), 0.0).seconds
    assert both == pytest.approx(alone + rounds)


def test_what_is_near_does_not_wait_for_what_comes_from_far() -> None:
    """Rank 0 hears two others: whichever of them is far, the near one's message is taken while the other travels."""
    entry = lookup("reduce", "central") if "central" in algorithms("reduce") else lookup("all_reduce", "one_shot")
    group = entry.group(3)
    bounds = [(unit, unit + 1) for unit in range(entry.units(group))]
    times = [
        simulate(
            3, entry.steps(group), bounds, lambda a, b, far=far: (10.0, 0.0, 100.0 if far in (a, b) else 0.0), 0.0
        ).seconds
        for far in (1, 2)
    ]
    assert times[0] == times[1]


def test_jobs_wait_for_their_data_and_for_each_other() -> None:
    """Two all-reduces of a training step: the second has its data while the first still runs."""
    entry = lookup("all_reduce", "ring")
    group = entry.group(4)
    alone = simulate(4, entry.steps(group), share_bounds(4000, 4), flat(4, 1e-3, 1e-6, 0.0).link, 0.0).seconds

    def jobs(*ready: float) -> list[Job]:
        return [Job(entry.steps(group), share_bounds(4000, 4), [when] * 4) for when in ready]

    link = flat(4, 1e-3, 1e-6, 0.0).link
    cost, times = simulate_jobs(4, jobs(0.5, 0.5 + alone / 2), link, 0.0)
    assert times == [pytest.approx((0.5, 0.5 + alone)), pytest.approx((0.5 + alone, 0.5 + 2 * alone))]
    assert cost.seconds == pytest.approx(0.5 + 2 * alone)
    _, times = simulate_jobs(4, jobs(0.5, 5.0), link, 0.0, call=0.1)
    assert times == [pytest.approx((0.5, 0.6 + alone)), pytest.approx((5.0, 5.1 + alone))]
    late = [Job(entry.steps(group), share_bounds(4000, 4), [0.0, 0.0, 1.0, 0.0])]
    _, times = simulate_jobs(4, late, link, 0.0)
    assert times[0][0] == 0
    assert 1.0 < times[0][1] <= 1.0 + alone


def test_messages_share_the_ports_on_their_way() -> None:
    """Four ranks on two hosts send to the other host at once: by one port in and one out of each host."""
    steps = [[(Send((rank + 2) % 4, unit(0)), Recv((rank + 2) % 4, unit(1)))] for rank in range(4)]
    jobs = [Job(lambda rank: steps[rank], [(0, 1000), (1000, 2000)], [0.0] * 4)]

    def ports(sender: int, receiver: int) -> tuple[list[Port], list[Port]]:
        return [Port(sender // 2, 1e-6)], [Port(2 + receiver // 2, 1e-6)]

    own, _ = simulate_jobs(4, jobs, flat(4, 0.0, 1e-6, 0.0).link, 0.0)
    shared, _ = simulate_jobs(4, jobs, flat(4, 0.0, 1e-6, 0.0).link, 0.0, ports=ports)
    assert own.seconds == pytest.approx(1e-3)
    assert shared.seconds == pytest.approx(2e-3)


def exchange(nbytes: int, messages: int = 1) -> list[Job]:
    """Two ranks send messages of that size to each other."""
    ops = [(Send(1, unit(at)), Recv(1, unit(messages + at))) for at in range(messages)]
    back = [(Send(0, unit(messages + at)), Recv(0, unit(at))) for at in range(messages)]
    return [Job(lambda rank: (ops, back)[rank], [(0, nbytes)] * 2 * messages, [0.0, 0.0])]


def test_a_burst_passes_a_port_at_once_and_the_rest_at_its_rate() -> None:
    def ports(sender: int, receiver: int) -> tuple[list[Port], list[Port]]:
        return [Port(sender, 1e-6, 1000)], [Port(2 + receiver, 1e-6, 1000)]

    def seconds(nbytes: int, messages: int) -> float:
        return simulate_jobs(2, exchange(nbytes, messages), flat(2, 0.0, 1e-6, 0.0).link, 0.0, ports=ports)[0].seconds

    assert seconds(1000, 1) == 0.0
    assert seconds(4000, 1) == pytest.approx(3e-3)
    assert seconds(1000, 4) == pytest.approx(3e-3)


def test_ranks_wait_for_processors_that_they_share() -> None:
    """Two messages each way, with α of a processor at either end: eight times α of work."""

    def ports(sender: int, receiver: int) -> tuple[list[Port], list[Port]]:
        return [], []

    link = flat(2, 1.0, 0.0, 0.0).link
    times = [
        simulate_jobs(2, exchange(10, 2), link, 0.0, ports=ports, call=0.5, cores=cores)[0].seconds for cores in (1, 2)
    ]
    assert times == [pytest.approx(9.0), pytest.approx(4.5)]


@pytest.mark.parametrize(("cores", "seconds", "sent"), [(0, 8.0, 8.0), (1, 16.0, 12.0)])
def test_what_is_posted_is_copied_by_one_thread_of_its_sender_when_it_may_leave(
    cores: int, seconds: float, sent: float
) -> None:
    """Rank 0 sends four bytes each, of a second, to two that expect them at 0 and at 1: from 0 to 4, and from 4 to 8;
    by then it has not begun with the next job. One processor does the same work of receivers as well."""
    steps = [((Send(1, unit(0)), Send(2, unit(0))),), ((Recv(0, unit(0)),),), ((Recv(0, unit(0)),),)]
    jobs = [
        Job(lambda rank: steps[rank], [(0, 4)], ready, segment=4, depth=2, posted=True)
        for ready in ([0.0, 0.0, 1.0], [0.0, 100.0, 100.0])
    ]

    def ports(sender: int, receiver: int) -> tuple[list[Port], list[Port]]:
        return [Port(sender, 0.0)], [Port(3 + receiver, 0.0)]

    _, times = simulate_jobs(3, jobs, flat(3, 0.0, 0.0, 0.0).link, 0.0, ports=ports, cores=cores, copy=1.0)
    assert times[0] == (0.0, seconds)
    assert times[1][0] == sent


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("ring", (5,)),
        ("ring", (8,)),
        ("direct", (5,)),
        ("direct", (8,)),
        ("halving_doubling", (16,)),
        ("torus", (4, 6)),
    ],
)
def test_where_all_ranks_are_alike_one_is_simulated(name: str, grid: tuple[int, ...]) -> None:
    """Links between rows of a grid are slower, and turning from one sender to another takes longer there."""
    size = prod(grid)
    links = [(2e-6, 1e-9, 1e-6), (1e-5, 3e-9, 5e-6, 4e-9)][: len(grid)]
    topology, entry = grid_links(grid, links, 1e-10), lookup("all_reduce", name)
    group = entry.group(size, grid=grid if len(grid) > 1 else None)
    what = size, entry.steps(group), share_bounds(size << 10, entry.units(group)), topology.link, topology.gamma
    one, all_ = simulate_alike(*what), simulate(*what)
    assert one.seconds == pytest.approx(all_.seconds, rel=1e-9)
    assert one == replace(all_, seconds=one.seconds)


@pytest.mark.parametrize("name", ["tree", "central", "double_tree"])
def test_ranks_that_are_not_alike_are_refused(name: str) -> None:
    entry = lookup("all_reduce", name)
    group = entry.group(8)
    link = flat(8, 1e-6, 1e-9, 0.0).link
    with pytest.raises(ValueError, match="expected ranks that are alike"):
        simulate_alike(8, entry.steps(group), share_bounds(8 << 10, entry.units(group)), link, 0.0)


def test_a_job_is_of_all_ranks() -> None:
    with pytest.raises(ValueError, match=r"expected jobs of 3 ranks, got \[2\]"):
        simulate_jobs(3, exchange(10), flat(3, 0.0, 1e-6, 0.0).link, 0.0)


def test_bytes_of_several_senders_at_once_may_take_longer() -> None:
    """`direct` on three ranks: each receives two shares at once, and then two one after the other, as it turns."""
    entry = lookup("all_reduce", "direct")
    group = entry.group(3)
    bounds = share_bounds(3, entry.units(group))
    alike = simulate(3, entry.steps(group), bounds, lambda sender, receiver: (0.0, 1.0, 0.0), 0.0)
    crowded = simulate(3, entry.steps(group), bounds, lambda sender, receiver: (0.0, 1.0, 0.0, 2.0), 0.0)
    assert (alike.seconds, crowded.seconds) == (4.0, 2 * 2.0 + 2 * 1.5)


def test_a_rank_that_turns_to_another_sender_takes_longer_there() -> None:
    """Of halving-doubling on eight ranks, N/4 + N/8 and N/4 + N/2 bytes come after another peer's; on a ring none."""

    def seconds(name: str, *more: float) -> float:
        entry = lookup("all_reduce", name)
        group = entry.group(8)
        bounds = share_bounds(8, entry.units(group))
        return simulate(8, entry.steps(group), bounds, lambda sender, receiver: (0.0, 1.0, 0.0, *more), 0.0).seconds

    assert seconds("ring", 1.5) == seconds("ring") == 14.0
    assert seconds("halving_doubling") == 14.0
    assert seconds("halving_doubling", 1.5) == 14.0 + 0.25 * (2 + 1 + 2 + 4)
