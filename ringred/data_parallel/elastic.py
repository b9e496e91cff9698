"""What a process that joins a training needs: where the others are, and all that they have by now."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringred.communicator import Communicator
from ringred.data_parallel.recovery import Change, Recovery
from ringred.data_parallel.trees import uprooted
from ringred.errors import RingredError

__all__ = ["Elastic"]


class Elastic:
    """The state of a training that others can join: `model`, a DistributedDataParallel with `on_failure="shrink"`, and
    anything with `state_dict` and `load_state_dict` (optimizers, schedules, an `ElasticSampler`, other models), by
    position; and plain values by name, which are attributes from then on.

        state = ringred.Elastic(model, optimizer, sampler, best=0.0)
        for epoch in state.epochs(10):            # whoever joins begins here, in the epoch of the others
            for batch in loader: ...

    A process that joins gets all of it from a rank that is there, by broadcast: the weights, the objects' states, the
    values, and the states of the random number generators of torch (that of the CPU, and of the model's GPU), numpy and
    Python. It is let in where a round of the program begins: once each of the optimizers has made a step since the last
    round, and no gradients are left.

    Raises `TypeError` where a state holds anything but tensors, arrays, numbers, texts, and lists and dictionaries of
    these.
    """

    def __init__(self, model: Any, *objects: Any, **values: Any) -> None:
        recovery: Recovery | None = model.recovery
        if recovery is None:
            raise ValueError("Elastic: expected a DistributedDataParallel with on_failure='shrink'")
        for one in objects:
            if not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
                raise ValueError(
                    f"Elastic: expected objects with state_dict and load_state_dict, got {type(one).__name__}"
                )
        self._model, self._objects, self._recovery = model, objects, recovery
        self._names = sorted(values)
        self.epoch = self.step = 0
        self.__dict__.update(values)
        uprooted(self.handed_over())  # what cannot be sent is said now, not when somebody joins
        recovery.enrol(self)
        recovery.hands_over = True
        optimizers = [one for one in objects if hasattr(one, "register_step_post_hook")]
        recovery.optimizers = {id(one) for one in optimizers}
        for one in optimizers:
            one.register_step_post_hook(_notes(recovery))

    def epochs(self, count: int) -> Iterator[int]:
        """The numbers of the epochs that are left of `count`. Waits until the ranks are complete, first for a process
        that joins. Samplers begin each epoch by themselves."""
        self._recovery.join()
        while self.epoch < count:
            for one in self._objects:
                if hasattr(one, "set_epoch"):
                    one.set_epoch(self.epoch)
            yield self.epoch
            self.epoch += 1

    def steps(self, count: int) -> Iterator[int]:
        """The numbers of the steps that are left of `count`, for a program that has no epochs."""
        self._recovery.join()
        while self.step < count:
            yield self.step
            self.step += 1

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """The sum (or "avg", "min", "max", ...) of all ranks' `tensor`, the same on all; between two steps. Ranks that
        fail meanwhile do not count. `Communicator.all_reduce` would raise, on some of those that are left perhaps."""

        recovery = self._recovery

        def begin() -> _Sum:
            return _Sum(recovery, tensor, op)

        return recovery.carried(begin(), recovery.comm, begin, _Sum.wait).value

    # ------------------------------------------------------------------ other ranks

    def tells(self) -> None:
        """Nothing."""

    def follow(self, change: Change) -> None:
        """Nothing changes for those that are there."""

    def adopt(self, comm: Communicator) -> None:
        """The same."""

    def handed_over(self) -> dict[str, Any]:
        """What a rank that joins needs."""
        return {
            "weights": self._model.module.state_dict(),
            "buffers": dict(self._model.module.named_buffers()),
            "objects": [_state_of(one) for one in self._objects],
            "values": {name: getattr(self, name) for name in self._names},
            "epoch": self.epoch,
            "step": self.step,
            "random": _random_state(self._model.device),
        }

    def take_over(self, state: dict[str, Any]) -> None:
        """Goes on as a rank that has joined. Raises `RingredError` if the program is another one."""
        if len(state["objects"]) != len(self._objects) or sorted(state["values"]) != self._names:
            raise RingredError(
                f"Elastic: expected {len(state['objects'])} objects and the values {sorted(state['values'])}, as the "
                f"ranks that are there have them, got {len(self._objects)} and {self._names}"
            )
        self._model.module.load_state_dict(state["weights"])
        with torch.no_grad():  # those that are not in the state as well
            for name, buffer in self._model.module.named_buffers():
                buffer.copy_(state["buffers"][name])
        for one, given in zip(self._objects, state["objects"], strict=True):
            if not hasattr(one, "take_over"):
                one.load_state_dict(given)
        self.__dict__.update(state["values"])
        self.epoch, self.step = state["epoch"], state["step"]
        _set_random_state(state["random"], self._model.device)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {**self.handed_over(), "objects": [one.state_dict() for one in self._objects]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint, with another number of ranks perhaps."""
        self.take_over({**state, "objects": state["objects"]})
        for one, given in zip(self._objects, state["objects"], strict=True):
            one.load_state_dict(given)
        self.epoch += any(getattr(one, "epoch_is_over", False) for one in self._objects)


def _notes(recovery: Recovery) -> Callable[[Any, Any, Any], None]:
    def stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
        recovery.stepped(id(optimizer))

    return stepped


class _Sum:
    """An all-reduce that is made once, when it is waited for."""

    def __init__(self, recovery: Recovery, tensor: Tensor, op: str) -> None:
        self.value = tensor.clone()
        self._recovery, self._op, self._done = recovery, op, False

    def wait(self) -> None:
        """Returns once it is made."""
        if not self._done:
            self._recovery.comm.all_reduce(self.value, self._op)
            self._done = True


def _state_of(one: Any) -> Any:
    return None if hasattr(one, "take_over") else one.state_dict()  # a party of its own


def _random_state(device: torch.device) -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:  # a checkpoint may be of a training on CPUs
        torch.cuda.set_rng_state(state["cuda"], device)
