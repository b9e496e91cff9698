"""Writes a schedule as a page that shows it: one file, which any browser opens, and which loads nothing."""

from __future__ import annotations

import html
import inspect
import json
from importlib.resources import files
from typing import Any

from ringred.collectives.registry import Algorithm, prove, spec_of
from ringred.runtime.select import share_bounds
from ringred.schedule.ir import Group
from ringred.schedule.story import tell
from ringred.testing.command.parsing import size_of
from ringred.topology.model import Topology

__all__ = ["page", "story_of"]

_MOST_MESSAGES = 10_000  # they are replayed for each round


def page(entry: Algorithm, group: Group, nbytes: int, model: Topology) -> str:
    """The page of `entry` on `group` for `nbytes` bytes. Raises `ScheduleError` if the schedule is wrong, and
    ValueError if it has too many messages to be shown."""
    story = story_of(entry, group, nbytes, model)
    folder = files("ringred.testing.command")
    text = (folder / "animation.html").read_text("utf-8")
    data = json.dumps(story, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    script = (folder / "animation.js").read_text("utf-8")
    for place, what in (("TITLE", html.escape(story["title"])), ("STORY", data), ("SCRIPT", script)):
        before, _, after = text.partition(f"{{{{{place}}}}}")
        text = before + what + after
    return text


def story_of(entry: Algorithm, group: Group, nbytes: int, model: Topology) -> dict[str, Any]:
    """What the page shows, as JSON; masks of ranks are hexadecimal."""
    messages = sum(prove(entry, group).messages)
    if messages > _MOST_MESSAGES:
        raise ValueError(
            f"{entry.collective} by {entry.name!r} on {group} sends {messages} messages, of which a page shows at most "
            f"{_MOST_MESSAGES}: take fewer ranks, or fewer bytes where there are segments"
        )
    bounds = share_bounds(nbytes, entry.units(group))
    spec = spec_of(entry, group)
    story = tell(spec, entry.steps(group), bounds, model.link, model.gamma)
    masks: dict[int, int] = {}

    def number(mask: int) -> int:
        return masks.setdefault(mask, len(masks))

    transfers: list[list[Any]] = []
    for one in story.transfers:
        carried = [number(mask) for mask in one.carried]
        same = carried[0] if len(set(carried)) == 1 else carried
        times = [float(f"{seconds:.7g}") for seconds in (one.begin, one.end)]
        transfers.append([one.sender, one.receiver, *one.chunk, int(one.reduce), one.round, one.taken, *times, same])
    alpha, beta, *_ = model.distance[0]
    costs = f"α = {alpha:g} s a message, β = {beta:g} s a byte, γ = {model.gamma:g} s a reduced byte"
    return {
        "title": f"{entry.collective} by {entry.name} on {group}",
        "summary": entry.summary,
        "model": f"{size_of(nbytes)}; {costs}",
        "collective": entry.collective,
        "size": group.size,
        "grid": group.grid,
        "units": spec.units,
        "unit_bytes": [stop - start for start, stop in bounds],
        "sources": [number(sum(1 << rank for rank in ranks)) for ranks in spec.sources],
        "wants": [sorted(units) for units in spec.wants],
        "seconds": float(f"{story.cost.seconds:.7g}"),
        "rounds": story.rounds,
        "transfers": transfers,
        "masks": [f"{mask:x}" for mask in masks],
        "source": _source(entry),
    }


def _source(entry: Algorithm) -> str:
    """The file of the algorithm, which is what runs."""
    module = inspect.getmodule(entry.schedule)
    try:
        return inspect.getsource(module) if module is not None else ""
    except OSError:  # it was typed in
        return ""
