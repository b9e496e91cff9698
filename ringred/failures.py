"""From what each rank saw when a collective failed to the one exception that says what went wrong.

When a wait fails, a rank publishes a report and reads those of the others. Nothing of this costs a message
while all goes well.
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
    """What one rank was doing and saw: its call, where in the program, and why its wait ended."""

    rank: int
    kind: str
    peer: int
    call: str
    site: str
    waited: float
    detail: str

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Report | None:
        """The report in `text`, or None where it is none: it came from another process."""
        try:
            values = json.loads(text)
            return cls(
                int(values["rank"]),
                str(values["kind"]),
                int(values["peer"]),
                str(values["call"]),
                str(values["site"]),
                float(values["waited"]),
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
    calls: dict[str, list[Report]] = {}
    for rank in sorted(everyone):
        if everyone[rank].kind != RAISED:
            calls.setdefault(everyone[rank].call, []).append(everyone[rank])
    if len(calls) > 1:
        described = "; ".join(_called(call, group) for call, group in calls.items())
        return CollectiveMismatch(f"rank {mine.rank}: the ranks did not make the same call: {described}")
    dead = sorted({r.peer for r in everyone.values() if r.kind == FaultKind.PEER} - everyone.keys())
    if dead:
        detail = next(r.detail for r in everyone.values() if r.kind == FaultKind.PEER and r.peer == dead[0])
        return PeerFailed(f"{who}: {_ranks(dead)} {'is' if len(dead) == 1 else 'are'} gone ({detail})")
    if any(report.kind == FaultKind.MISMATCH for report in everyone.values()):
        seen = next(r for r in everyone.values() if r.kind == FaultKind.MISMATCH)
        return CollectiveMismatch(
            f"{who}: rank {seen.rank} got a message of another call from rank {seen.peer} ({seen.detail}); "
            f"rank {seen.peer} has not said which"
        )
    timed_out = [report for report in everyone.values() if report.kind == FaultKind.TIMEOUT]
    if timed_out:
        first = max(timed_out, key=lambda report: report.waited)
        missing = sorted(set(range(size)) - everyone.keys()) or [first.peer]
        return CollectiveTimeout(
            f"{who}: {_ranks(missing)} did not take part within {first.waited:.3g} s "
            f"(rank {first.rank} waited for rank {first.peer})"
        )
    gone = next((report for report in everyone.values() if report.kind == FaultKind.PEER), mine)
    return PeerFailed(f"{who}: rank {gone.peer} left ({gone.detail or 'it gave the communicator up'})")


def _called(call: str, group: list[Report]) -> str:
    sites = sorted({report.site for report in group})
    return f"{_ranks([report.rank for report in group])} {call} at {', '.join(sites)}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
