"""Notices parameters that were replaced, frozen or unfrozen after DistributedDataParallel was constructed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

__all__ = ["AsGiven"]


class AsGiven:
    """The parameters of `module` as they are now; those in `members` are reduced, those named in `ignored` are not."""

    def __init__(self, rank: int, module: nn.Module, ignored: Collection[str], members: Sequence[Tensor]) -> None:
        self._rank, self._ignored = rank, ignored
        self._members = frozenset(map(id, members))
        self._given = _seen(module)

    def check(self, module: nn.Module, find_unused: bool) -> None:
        """Raises `RuntimeError` if a gradient would not be reduced, or would be waited for in vain."""
        if _seen(module) == self._given:
            return
        now = [(name, p) for name, p in module.named_parameters() if name not in self._ignored]
        for name, parameter in now:
            if parameter.requires_grad and id(parameter) not in self._members:
                raise RuntimeError(
                    f"rank {self._rank}: parameter {name!r} was added, replaced or unfrozen after "
                    "DistributedDataParallel was constructed; its gradient would not be reduced. Construct it anew"
                )
        frozen = [name for name, p in now if id(p) in self._members and not p.requires_grad]
        if frozen and len(frozen) < len(self._members) and not find_unused:
            raise RuntimeError(
                f"rank {self._rank}: parameter {frozen[0]!r} was frozen after DistributedDataParallel was "
                "constructed, and its bucket would wait for it: construct it anew, or use find_unused_parameters=True"
            )


def _seen(module: nn.Module) -> list[tuple[int, bool]]:
    return [(id(parameter), parameter.requires_grad) for parameter in module.parameters()]
