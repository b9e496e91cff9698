"""Draws a schedule as a grid of ranks × steps, in plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ringred.schedule.ir import Send, Step, fold_groups

__all__ = ["LEGEND", "draw"]

LEGEND = "k→r: chunk k sent to rank r    k+r: chunk k from rank r added    k=r: chunk k from rank r put in place"


def draw(
    size: int,
    schedule: Callable[[int], Iterable[Step]],
    *,
    max_ranks: int = 16,
    max_steps: int = 12,
    mark: tuple[int, int] | None = None,
) -> str:
    """The rank × step grid of `schedule`; `mark` is a (rank, step) to point at, where something went wrong.

    At most `max_ranks` rows and `max_steps` columns are drawn; what is left out is counted in the last line.
    """
    steps = [list(schedule(rank)) for rank in range(min(size, max_ranks))]
    longest = max((len(rank) for rank in steps), default=0)
    shown = min(longest, max_steps)
    rows = [["rank", *(f"step {index}" for index in range(shown))]]
    for rank, rank_steps in enumerate(steps):
        cells = [_cell(step) for step in rank_steps[:shown]]
        cells += [""] * (shown - len(cells))
        if mark is not None and mark[0] == rank and mark[1] < shown:
            cells[mark[1]] = f">> {cells[mark[1]]} <<"
        rows.append([str(rank), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(shown + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    left_out = []
    if longest > shown:
        left_out.append(f"{longest - shown} more steps")
    if size > max_ranks:
        left_out.append(f"{size - max_ranks} more ranks")
    if left_out:
        lines.append(f"... and {' and '.join(left_out)}")
    return "\n".join([*lines, LEGEND])


def _cell(step: Step) -> str:
    sends: dict[str, list[str]] = {}
    for op in step:
        if isinstance(op, Send):
            sends.setdefault(str(op.chunk), []).append(str(op.peer))
    parts = [f"{chunk}→{_run(peers)}" for chunk, peers in sends.items()]
    parts += [
        f"{chunk}{'+' if reduce else '='}{_run([str(peer) for peer in peers])}"
        for chunk, reduce, peers in fold_groups(step)
    ]
    return _shorten(parts)


def _run(peers: list[str]) -> str:
    return ",".join(peers) if len(peers) <= 4 else f"{peers[0]},{peers[1]}…{peers[-1]}"


def _shorten(parts: list[str]) -> str:
    return " ".join(parts) if len(parts) <= 4 else f"{parts[0]} {parts[1]} … {parts[-1]} ({len(parts)})"
