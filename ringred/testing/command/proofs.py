"""`ringred verify` and `ringred explain`: schedules proved, priced, drawn and shown."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ringred.collectives.registry import COLLECTIVES, algorithms, groups, lookup, prove
from ringred.runtime.select import candidates, predict, segments_for, share_bounds
from ringred.schedule import closed_forms
from ringred.schedule.draw import draw
from ringred.schedule.ir import Op, Send
from ringred.testing.command.animation import page
from ringred.testing.command.parsing import add_json, count, grid, say, seconds, size
from ringred.topology.model import flat

__all__ = ["add_proofs"]

_MOST_MESSAGES = 300_000


def add_proofs(commands: Any) -> None:
    """Adds the commands to the others."""
    verify = commands.add_parser("verify", help="prove every schedule on every number of ranks and every grid")
    verify.add_argument("--max-ranks", type=count, default=17, metavar="N", help="1 to N ranks (default 17)")
    add_json(verify)
    verify.set_defaults(command=_verify)

    explain = commands.add_parser("explain", help="steps, messages, bytes and predicted time of a collective")
    explain.add_argument("collective", choices=COLLECTIVES, metavar="COLLECTIVE", help=", ".join(COLLECTIVES))
    explain.add_argument("--ranks", type=count, required=True, metavar="N")
    explain.add_argument("--bytes", type=size, metavar="SIZE", help="such as 4, 64K, 25M, 1G; a barrier has none")
    explain.add_argument("--algorithm", metavar="NAME", help="one of them; all, without drawing, where left out")
    explain.add_argument("--grid", type=grid, metavar="XxY", help="such as 4x3, X innermost")
    explain.add_argument("--alpha", type=seconds, default=20e-6, metavar="S", help="seconds a message (default 20e-6)")
    explain.add_argument("--beta", type=seconds, default=0.32e-9, metavar="S", help="seconds a byte (default 0.32e-9)")
    explain.add_argument("--gamma", type=seconds, default=0.1e-9, metavar="S", help="seconds a reduced byte (0.1e-9)")
    explain.add_argument("--html", type=Path, metavar="FILE", help="a page that shows the schedule step by step")
    add_json(explain)
    explain.set_defaults(command=_explain)


def _verify(options: argparse.Namespace) -> int:
    began = time.monotonic()
    rows, total = [], 0
    for collective in COLLECTIVES:
        for name, entry in sorted(algorithms(collective).items()):
            if entry.native:
                continue
            proofs = [
                prove(entry, group) for ranks in range(1, options.max_ranks + 1) for group in groups(entry, ranks)
            ]
            total += len(proofs)
            rows.append((collective, name, len(proofs), all(proof.rank_ordered for proof in proofs), entry.summary))
    took = time.monotonic() - began
    heads = ["collective", "algorithm", "proved", "in rank order", ""]
    table = tabulate([(*row[:3], "yes" if row[3] else "", row[4]) for row in rows], headers=heads)
    keys = ("collective", "algorithm", "proved", "in_rank_order", "summary")
    result = {"proved": total, "max_ranks": options.max_ranks, "seconds": took}
    say(
        options,
        result | {"algorithms": [dict(zip(keys, row, strict=True)) for row in rows]},
        f"{table}\n\n{total} schedules proved on 1 to {options.max_ranks} ranks in {took:.1f} s",
    )
    return 0


def _explain(options: argparse.Namespace) -> int:
    if options.collective == "send_recv" and options.ranks != 2:
        raise ValueError(f"explain: send_recv is between 2 ranks, got --ranks {options.ranks}")
    if options.collective == "barrier":
        if options.bytes is not None:
            raise ValueError("explain: a barrier carries no bytes: leave --bytes out")
        options.bytes = 0
    elif options.bytes is None:
        raise ValueError("explain: expected --bytes, such as 64K or 25M")
    if options.algorithm is None:
        return _compare(options)
    model = flat(options.ranks, options.alpha, options.beta, options.gamma)
    entry = lookup(options.collective, options.algorithm)
    if entry.native:
        raise ValueError(f"explain: {options.algorithm!r} is the library's own; its steps are not known")
    group = entry.group(options.ranks, 0, options.grid, segments_for(options.bytes, 1 << 20))
    messages = sum(isinstance(op, Send) for step in entry.steps(group)(0) for op in step) * group.size
    if messages > _MOST_MESSAGES:
        raise ValueError(
            f"explain: {entry.name} on {group.size} ranks sends about {messages} messages, and at most "
            f"{_MOST_MESSAGES} are proved and priced here: take fewer ranks"
        )
    proof = prove(entry, group)
    bounds = share_bounds(options.bytes, entry.units(group))
    cost = predict(entry, group, options.bytes, model)
    form = None
    if options.collective == "all_reduce":
        links = ((options.alpha, options.beta),) * len(group.grid or (1,))
        form = closed_forms.all_reduce(entry.name, group, options.bytes, links, options.gamma)
    if options.html is not None:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(page(entry, group, options.bytes, model), "utf-8")
    table: list[tuple[str, object, object]] = [
        ("messages sent by the busiest rank", cost.messages, "" if form is None else form.messages),
        (
            "bytes sent by the busiest rank",
            cost.bytes_sent,
            "" if form is None else f"{form.data_sent * bounds[-1][1]:.0f}",
        ),
        ("bytes received by the busiest rank", cost.bytes_received, ""),
        ("predicted ms", f"{cost.seconds * 1e3:.3f}", "" if form is None else f"{form.seconds * 1e3:.3f}"),
    ]
    shown = tabulate(
        table, headers=["", "schedule", "closed form"], disable_numparse=True, colalign=("left", "right", "right")
    )
    steps = entry.steps(group)
    text = (
        f"{_head(options)} by {entry.name} ({group}), {entry.summary}\n{_costs(options)}; proved, "
        f"{max(proof.steps)} steps\n{shown}\n\n{draw(group.size, steps)}"
    )
    if options.html is not None:
        text += f"\n\nshown step by step: {options.html}"
    result = _asked(options) | {
        "algorithm": entry.name,
        "grid": group.grid,
        "segments": group.segments,
        "steps": max(proof.steps),
        "rank_ordered": proof.rank_ordered,
        "messages_of_the_busiest": cost.messages,
        "bytes_sent_by_the_busiest": cost.bytes_sent,
        "bytes_received_by_the_busiest": cost.bytes_received,
        "seconds": cost.seconds,
        "closed_form_seconds": None if form is None else form.seconds,
        "schedule": [[[list(_operation(op)) for op in step] for step in steps(rank)] for rank in range(group.size)],
    }
    say(options, result, text)
    return 0


def _operation(op: Op) -> tuple[str, int, int, int]:
    what = "send" if isinstance(op, Send) else "add" if op.reduce else "put"
    return what, op.peer, op.chunk.start, op.chunk.stop


def _compare(options: argparse.Namespace) -> int:
    for name in ("grid", "html"):
        if getattr(options, name) is not None:
            raise ValueError(f"explain: --{name} needs --algorithm")
    model = flat(options.ranks, options.alpha, options.beta, options.gamma)
    found = candidates(options.collective, options.ranks, options.bytes, model)
    rows = [(c.name, "x".join(map(str, c.grid)) if c.grid else "", f"{c.seconds * 1e3:.3f}") for c in found]
    ranked = [{"algorithm": c.name, "grid": c.grid, "seconds": c.seconds} for c in found]
    say(
        options,
        _asked(options) | {"algorithms": ranked},
        f"{_head(options)}; {_costs(options)}\n{tabulate(rows, headers=['algorithm', 'grid', 'predicted ms'])}",
    )
    return 0


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    names = ("collective", "ranks", "bytes", "alpha", "beta", "gamma")
    return {name: getattr(options, name) for name in names}


def _head(options: argparse.Namespace) -> str:
    return f"{options.collective} of {options.bytes} bytes on {options.ranks} ranks"


def _costs(options: argparse.Namespace) -> str:
    return f"α = {options.alpha:g} s, β = {options.beta:g} s/B, γ = {options.gamma:g} s/B"
