"""What a DistributedDataParallel tells of itself: its buckets, what overlapped, who was late."""

from __future__ import annotations

from pathlib import Path

from ringred.buckets import FIRST_BUCKET_BYTES
from ringred.communicator import Communicator
from ringred.data_parallel import arguments
from ringred.data_parallel.overlap import OverlapReport, forecast, report
from ringred.data_parallel.reducer import Reducer
from ringred.data_parallel.replicas import check_same_values
from ringred.data_parallel.stragglers import StragglerReport, straggler_report
from ringred.errors import RingredError

__all__ = ["Reporting"]


class Reporting:
    """The part of a DistributedDataParallel that reports."""

    comm: Communicator
    reducer: Reducer

    def bucket_plan(self) -> list[list[str]]:
        """The parameters' names bucket by bucket, for the `bucket_plan` of another run. After two iterations buckets
        stay as they are."""
        return [[self.reducer.members.names[at] for at in indices] for indices in self.reducer.layout.plan]

    def save_bucket_plan(self, path: str | Path) -> None:
        """Writes `bucket_plan()` to a file (JSON), whole or not at all."""
        arguments.write_plan(path, self.bucket_plan(), self.comm.rank)

    def check_desync(self) -> None:
        """Raises `ReplicasDiverged` on every rank if parameters differ between ranks. Collective."""
        check_same_values(self.comm, self.reducer.members.names, self.reducer.members.parameters)

    def overlap_report(self) -> OverlapReport:
        """Reports, for each bucket of the last synchronised backward, when it was full, when its reduction started and
        ended, and how long it ran after backward; and which `bucket_cap_mb` would hide more. Raises
        `RingredError` before the first synchronised backward."""
        times = self.reducer.clock.last
        if times is None:
            raise RingredError(f"rank {self.comm.rank}: overlap_report: no synchronised backward was made yet")
        first = FIRST_BUCKET_BYTES if len(self.reducer.settings.caps) == 2 else None
        caps, slowness = forecast(
            times, self.reducer.layout.entries, self.reducer.members.sparse, self.comm.predicted_seconds, first
        )
        return report(times, caps, slowness)

    def straggler_report(self) -> StragglerReport:
        """Reports which rank the others waited for over the last iterations; the same on all ranks. Collective."""
        return straggler_report(self.comm, self.reducer.clock.arrivals)
