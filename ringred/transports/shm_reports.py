"""The reports of `shm`: what a rank that failed wrote into its control block, for all to read."""

from __future__ import annotations

from collections.abc import Collection

from ringred.transports.base import Fault, FaultKind
from ringred.transports.futex import order
from ringred.transports.links import ABORTED, ALARM, REPORT_BYTES, REPORT_LENGTH, Layout, Link
from ringred.transports.windows import Window

__all__ = ["Reports"]


class Reports:
    """Those of a transport's ranks; that of `rank`, this one, lies at `block` of its `window`."""

    def __init__(self, rank: int, window: Window, block: int, links: Collection[Link], layout: Layout) -> None:
        self._own, self._links, self._at = (window, block), links, layout.report
        self._blocks = {rank: (window, block)} | {link.rank: (link.window, link.block) for link in links}

    @property
    def written(self) -> bool:
        """Whether this rank's is."""
        window, block = self._own
        return window.words[block // 8 + ABORTED] != 0

    def write(self, report: str) -> None:
        """Writes this rank's. `alarm` tells the others."""
        window, block = self._own
        text = report.encode()[:REPORT_BYTES]
        start = block + self._at
        window.memory[start : start + len(text)] = text
        window.words[block // 8 + REPORT_LENGTH] = len(text)
        order()
        window.words[block // 8 + ABORTED] = 1
        order()
        window.words[block // 8 + ALARM] = 1

    def alarm(self) -> None:
        """Lets every peer look."""
        for link in self._links:
            link.words[link.words_at + ALARM] = 1
            link.wake()

    def read(self) -> dict[int, str]:
        """All that are there, by rank, in ascending order."""
        found = {}
        for rank in sorted(self._blocks):
            window, block = self._blocks[rank]
            if window.words[block // 8 + ABORTED]:
                order()
                length = min(window.words[block // 8 + REPORT_LENGTH], REPORT_BYTES)
                start = block + self._at
                found[rank] = window.memory[start : start + length].decode(errors="replace")
        return found

    def check(self) -> None:
        """Raises `Fault` if there is any."""
        found = self.read()
        if found:
            culprit = next(iter(found))
            raise Fault(FaultKind.ABORTED, culprit, found[culprit])
