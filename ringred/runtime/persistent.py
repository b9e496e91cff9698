"""An all-reduce that is prepared once and started many times, as MPI-4's persistent collectives are."""

from __future__ import annotations

from ringred.runtime.calls import Prepared
from ringred.runtime.runner import Runner
from ringred.runtime.work import Work

__all__ = ["PersistentAllReduce"]


class PersistentAllReduce:
    """An all-reduce whose plan is made: `start()` runs it on the values that its tensor then holds."""

    def __init__(self, runner: Runner, prepared: Prepared) -> None:
        self._runner, self._prepared = runner, prepared

    @property
    def algorithm(self) -> str:
        """The name of the algorithm that it runs."""
        return self._prepared.call.algorithm.name

    def start(self, purpose: str = "") -> Work[None]:
        """Starts it on the progress thread. `purpose` is as in `Communicator.for_purpose`."""
        prepared = self._prepared
        if purpose:
            prepared = prepared._replace(call=prepared.call.for_purpose(purpose))
        work = self._runner.launch(prepared, async_op=True)
        assert work is not None, "asynchronous calls return their work"
        return work
