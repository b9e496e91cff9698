"""An all-reduce that is prepared once and started many times, as MPI-4's persistent collectives are."""

from __future__ import annotations

from torch import Tensor

from ringred.errors import UnsupportedTensor
from ringred.runtime.calls import Prepared
from ringred.runtime.executor import Plan
from ringred.runtime.runner import Runner
from ringred.runtime.work import Work

__all__ = ["PersistentAllReduce"]


class PersistentAllReduce:
    """An all-reduce whose plan is made: `start()` runs it on the values that its tensor then holds."""

    def __init__(self, runner: Runner, prepared: Prepared, tensor: Tensor) -> None:
        self._runner, self._prepared, self._tensor = runner, prepared, tensor.detach()
        self._address = self._tensor.data_ptr()
        self._purpose, self._purposed = "", prepared

    @property
    def algorithm(self) -> str:
        """The name of the algorithm that it runs."""
        return self._prepared.call.algorithm.name

    def start(self, purpose: str = "") -> Work[None]:
        """Starts it on the progress thread. `purpose` is as in `Communicator.for_purpose`."""
        work = self._runner.launch(self._for(purpose), async_op=True)
        assert work is not None, "asynchronous calls return their work"
        return work

    def _for(self, purpose: str) -> Prepared:
        if self._tensor.data_ptr() != self._address:
            self._moved()
        if purpose != self._purpose:
            call = self._prepared.call
            self._purpose, self._purposed = purpose, self._prepared._replace(call=call.for_purpose(purpose))
        return self._purposed if purpose else self._prepared

    def _moved(self) -> None:
        """The tensor's storage has other memory now: `share_memory_()` was called, or it was freed and made anew."""
        tensor, plan = self._tensor, self._prepared.plan
        if tensor.numel() and not tensor.data_ptr():
            raise UnsupportedTensor(
                f"{self._prepared.call.text}: expected the tensor that it was made for, which has no memory"
            )
        self._address = tensor.data_ptr()
        if isinstance(plan, Plan):
            plan.tape = None
