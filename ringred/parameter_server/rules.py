"""How a shard changes its values by a gradient: it adds it, takes it, or steps an optimizer of torch.

A rule goes over the wire as JSON: names of classes in `torch.optim`, and numbers.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from ringred.data_parallel.elementwise import ELEMENTWISE
from ringred.errors import PolicyError

__all__ = ["MakeOptimizer", "MakeSchedule", "Rule", "Stepper", "rule_of"]

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
_COMPARED = 40  # updates in which a schedule that was described must equal the one that was given


class Rule(NamedTuple):
    """`kind` is "add", "assign" or the name of a class in torch.optim; `groups` have the options of its parameter
    groups; `schedule` is the name and the arguments of a class in torch.optim.lr_scheduler, or None."""

    kind: str
    groups: list[dict[str, Any]]
    schedule: tuple[str, dict[str, Any]] | None = None

    @property
    def cuttable(self) -> bool:
        """Whether a shard may have a part of a tensor."""
        return self.kind in ("add", "assign") or getattr(torch.optim, self.kind) in ELEMENTWISE

    def fits(self, other: Rule) -> bool:
        """Whether a state under `other`, whose options then count, can be taken: one optimizer, and as many groups."""
        return self.kind == other.kind and len(self.groups) == len(other.groups)

    def as_json(self) -> dict[str, Any]:
        return self._asdict()

    @classmethod
    def from_json(cls, data: Any) -> Rule:
        """Raises `PolicyError` unless `data` describes a rule that this version of torch has."""
        try:
            kind, groups, schedule = data["kind"], data["groups"], data["schedule"]
            if kind not in ("add", "assign"):
                _class(torch.optim, kind, torch.optim.Optimizer)
            if schedule is not None:
                _class(lr_scheduler, schedule[0], lr_scheduler.LRScheduler)
                schedule = (str(schedule[0]), dict(schedule[1]))
            return cls(kind, [dict(group) for group in groups], schedule)
        except (KeyError, TypeError, ValueError, IndexError) as failure:
            raise PolicyError(f"no update rule: {type(failure).__name__}: {failure}") from None

    def stepper(self) -> Stepper:
        """What applies the rule to the values of one shard."""
        return Stepper(self)


def rule_of(
    make: MakeOptimizer | str, parameters: Sequence[nn.Parameter], schedule: MakeSchedule | None
) -> tuple[Rule, list[int]]:
    """The rule that `make` stands for, and of each parameter the number of its group.

    `make(parameters)` returns one of torch.optim's optimizers, for `parameters` or groups of them; or it is "add" or
    "assign". Raises `PolicyError` for what cannot be described to a server.
    """
    if isinstance(make, str):
        if make not in ("add", "assign"):
            raise PolicyError(f"the rule is 'add', 'assign' or a function that makes an optimizer, got {make!r}")
        return Rule(make, [{}]), [0] * len(parameters)
    optimizer = make(parameters)
    kind = type(optimizer)
    if getattr(torch.optim, kind.__name__, None) is not kind or kind in (torch.optim.LBFGS, torch.optim.SparseAdam):
        raise PolicyError(
            f"a shard steps the optimizers of torch.optim by gradients; {kind.__module__}.{kind.__qualname__} is none"
        )
    place = {id(parameter): at for at, parameter in enumerate(parameters)}
    group_of = [-1] * len(parameters)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in place:
                raise PolicyError("the optimizer has a parameter that the parameter server does not have")
            group_of[place[id(parameter)]] = number
        groups.append({name: value for name, value in group.items() if name not in ("params", "initial_lr")})
    missing = [at for at, group in enumerate(group_of) if group < 0]
    if missing:
        raise PolicyError(f"the optimizer was not given {len(missing)} of {len(parameters)} parameters: {missing[:5]}")
    try:
        json.dumps(groups)
    except TypeError as failure:
        raise PolicyError(f"{kind.__name__}: an option cannot be sent to a server: {failure}") from None
    return Rule(kind.__name__, groups, None if schedule is None else _described(schedule, optimizer)), group_of


def _described(make: MakeSchedule, optimizer: torch.optim.Optimizer) -> tuple[str, dict[str, Any]]:
    """The class and the arguments of a schedule. It keeps most of its arguments as attributes of their names."""
    rates = [group["lr"] for group in optimizer.param_groups]
    given = make(optimizer)
    kind = type(given)
    arguments = {}
    for name in inspect.signature(kind.__init__).parameters:
        if name in ("self", "optimizer", "last_epoch", "verbose") or not hasattr(given, name):
            continue
        value = getattr(given, name)
        arguments[name] = sorted(value.elements()) if isinstance(value, Counter) else value
    try:
        text = json.dumps(arguments)
        again = _class(lr_scheduler, kind.__name__, lr_scheduler.LRScheduler)(_rates_only(rates), **json.loads(text))
        same = kind is type(again) and _rates(given, optimizer) == _rates(again, again.optimizer)
    except (TypeError, ValueError, RuntimeError, KeyError):
        same = False
    if not same:
        raise PolicyError(
            f"{kind.__name__}: this schedule cannot be described to a server by its arguments; set the rate by "
            "`scale_rate` instead"
        )
    return kind.__name__, arguments


def _rates_only(rates: Sequence[float]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def _rates(schedule: lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    found = []
    for _ in range(_COMPARED):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def _class(module: Any, name: Any, base: type) -> Any:
    kind = getattr(module, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"{module.__name__} has no {base.__name__} called {name!r}")
    return kind


class Stepper:
    """One shard's values, under a rule; values may be added at any time."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule: lr_scheduler.LRScheduler | None = None
        self.values: list[nn.Parameter] = []

    def add(self, value: Tensor, group: int) -> None:
        """`value`, which the steps change in place, belongs to the group of that number."""
        parameter = nn.Parameter(value, requires_grad=False)
        self.values.append(parameter)
        if self.rule.kind in ("add", "assign"):
            return
        if self.optimizer is None:
            options = self.rule.groups
            kind = getattr(torch.optim, self.rule.kind)
            nothing = [{"params": [], **option} for option in options]
            self.optimizer = kind(nothing, lr=options[0]["lr"])
            if self.rule.schedule is not None:
                name, arguments = self.rule.schedule
                self.schedule = getattr(lr_scheduler, name)(self.optimizer, **arguments)
        self.optimizer.param_groups[group]["params"].append(parameter)

    def step(self, gradients: Sequence[Tensor | None], rate: float) -> None:
        """One update by the gradients of the values, None where there is none, at the current rate times `rate`."""
        if self.optimizer is None:
            for value, gradient in zip(self.values, gradients, strict=True):
                if gradient is not None:
                    value.add_(gradient, alpha=rate) if self.rule.kind == "add" else value.copy_(gradient)
            return
        for value, gradient in zip(self.values, gradients, strict=True):
            value.grad = gradient
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if rate != 1.0:
            for group in self.optimizer.param_groups:
                group["lr"] *= rate
        self.optimizer.step()
        for group, before in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = before
        if self.schedule is not None:
            self.schedule.step()

    def state(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What it keeps besides the values: JSON, and tensors that it refers to by their places in the list."""
        tensors: list[Tensor] = []
        if self.optimizer is None:
            return {}, tensors
        kept = []
        for value in self.values:
            entries = {}
            for name, entry in self.optimizer.state.get(value, {}).items():
                if isinstance(entry, Tensor):
                    entries[name] = {"tensor": len(tensors)}
                    tensors.append(entry)
                else:
                    entries[name] = {"number": entry}
            kept.append(entries)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        schedule = None if self.schedule is None else _plain(self.schedule.state_dict())
        return {"kept": kept, "rates": rates, "schedule": schedule}, tensors

    def load_state(self, state: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """Takes what `state` returned for the same values."""
        if self.optimizer is None:
            return
        for value, entries in zip(self.values, state["kept"], strict=True):
            self.optimizer.state[value] = {
                name: tensors[entry["tensor"]] if "tensor" in entry else entry["number"]
                for name, entry in entries.items()
            }
        for group, rate in zip(self.optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        if self.schedule is not None:
            kept = {**self.schedule.state_dict(), **state["schedule"]}
            if "milestones" in kept and not isinstance(kept["milestones"], Counter):
                kept["milestones"] = Counter(kept["milestones"])
            self.schedule.load_state_dict(kept)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a schedule's state, which JSON can hold."""
    return {
        name: sorted(value.elements()) if isinstance(value, Counter) else value
        for name, value in state.items()
        if not name.startswith("_") or name in ("_step_count", "_last_lr")
    }
