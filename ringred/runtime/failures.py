"""Combines what each rank saw when a collective failed into one exception that says what went wrong.

When a wait fails, a rank publishes a report and reads those of the others. As long as nothing fails, this costs no
messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ringred.errors import CollectiveMismatch, CollectiveTimeout, PeerFailed, RingredError
from ringred.transports.base import FaultKind

__all__ = ["RAISED", "Report", "diagnose"]

RAISED = "raised"
"""The kind of report of a rank that raised an exception of its own and takes no further part."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank did and saw: its call, the call's number and place in the program, and why its wait ended.

    `waited` and `timeout`, which the wait had, are in seconds.
    """

    rank: int
    kind: str
    peer: int
    number: int
    call: str
    site: str
    waited: float
    timeout: float
    detail: str

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Report | None:
        """The report in `text`, or None if `text`, which comes from another process, is not a valid report."""
        try:
            values = json.loads(text)
            return cls(
                int(values["rank"]),
                str(values["kind"]),
                int(values["peer"]),
                int(values["number"]),
                str(values["call"]),
                str(values["site"]),
                float(values["waited"]),
                float(values["timeout"]),
                str(values["detail"]),
            )
        except (ValueError, KeyError, TypeError):
            return None


def diagnose(mine: Report, reports: Mapping[int, Report], size: int) -> RingredError:
    """The exception for this rank: who failed first, who is missing, or who called what."""
    everyone = {**reports, mine.rank: mine}
    who = f"rank {mine.rank}: {mine.call} at {mine.site}"
    for report in everyone.values():
        if report.kind == RAISED and report.rank != mine.rank:
            return PeerFailed(f"{who} given up: rank {report.rank} raised {report.detail}")
    speaking = [everyone[rank] for rank in sorted(everyone) if everyone[rank].kind != RAISED]
    turn = min(report.number for report in speaking)
    calls: dict[str, list[Report]] = {}
    for report in speaking:
        if report.number == turn:
            calls.setdefault(report.call, []).append(report)
    ahead = [report for report in speaking if report.number > turn]
    seen = next((report for report in speaking if report.kind == FaultKind.MISMATCH), None)
    if len(calls) > 1 or seen is not None:
        return _mismatch(mine, calls, ahead, seen)
    dead = sorted({r.peer for r in speaking if r.kind == FaultKind.PEER} - everyone.keys())
    if dead:
        detail = next(r.detail for r in speaking if r.kind == FaultKind.PEER and r.peer == dead[0])
        return PeerFailed(f"{who}: {_ranks(dead)} {'is' if len(dead) == 1 else 'are'} gone ({detail})")
    timed_out = [report for report in speaking if report.kind == FaultKind.TIMEOUT]
    missing = sorted(set(range(size)) - everyone.keys())
    if ahead and not (timed_out and missing):
        return _mismatch(mine, calls, ahead, None)
    stood = next((report for report in timed_out if report.peer == report.rank), None)
    if stood is not None:  # it waited for nobody else
        return CollectiveTimeout(
            f"{who}: the device of rank {stood.rank} was not done within the timeout of {stood.timeout:.3g} s"
        )
    if timed_out:
        first = max(timed_out, key=lambda report: report.waited)
        return CollectiveTimeout(
            f"{who}: {_ranks(missing or [first.peer])} did not take part within the timeout of {first.timeout:.3g} s "
            f"(rank {first.rank} waited for rank {first.peer})"
        )
    gone = next((report for report in speaking if report.kind == FaultKind.PEER), mine)
    return PeerFailed(f"{who}: rank {gone.peer} left ({gone.detail or 'it gave the communicator up'})")


def _mismatch(
    mine: Report, calls: Mapping[str, list[Report]], ahead: list[Report], seen: Report | None
) -> CollectiveMismatch:
    groups = list(calls.values())
    if len(calls) == 1:  # then by place, which is all that tells them apart where places must be equal
        (same,) = calls.values()
        groups = [[r for r in same if r.site == site] for site in dict.fromkeys(r.site for r in same)]
    said = [_called(group) for group in groups]
    said += [f"rank {r.rank} is past it, in {r.call} at {r.site}" for r in ahead]
    if seen is not None:
        whom = f"from rank {seen.peer} " if seen.peer >= 0 else ""
        said.append(f"rank {seen.rank} got {whom}what it did not expect: {seen.detail}")
    return CollectiveMismatch(f"rank {mine.rank}: the ranks did not make the same call: {'; '.join(said)}")


def _called(group: list[Report]) -> str:
    sites = sorted({report.site for report in group})
    return f"{_ranks([report.rank for report in group])} {group[0].call} at {', '.join(sites)}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
