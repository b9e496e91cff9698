"""α, β, γ and λ of the running machine, and what a call takes beside: fitted to measured times, and kept in a file.

The model is linear in them once an algorithm and a size are given: simulating a schedule with α = 1 and the others 0
counts the messages on its critical path, and so on. So a few measured collectives give all five by least squares.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

__all__ = ["KINDS", "SHORT_BYTES", "Costs", "Sample", "Tuning", "fit", "load", "rounded", "store"]

Costs: TypeAlias = tuple[float, float, float, float, float]
"""α in seconds a message, β in seconds a byte, γ in seconds a reduced byte, λ in seconds (see `schedule.cost`), and the
seconds of a call that depend on nothing: without them, what has fewer messages would look faster than it is."""

Tuning: TypeAlias = Mapping[str, Costs]
"""Costs by kind: "tensor" and "window" are memory within a host, "short tensor" and "short window" the same for up to
`SHORT_BYTES`, which stay in the caches next to a core; "between" is between hosts, and "native" is the transport's own
collective, where α is the cost of the whole call."""

KINDS = ("tensor", "window", "short tensor", "short window", "native", "between")
SHORT_BYTES = 128 << 10
_LEAST_LATENCY = 0.05  # of what a call takes beside its messages
_LEAST_REDUCING = 0.1  # of what a byte takes within a host
_KEPT = 64  # greatest number of entries (a machine and a job) in one file


class Sample(NamedTuple):
    """A measured collective: messages, bytes, reduced bytes and latencies on its critical path, its calls, of which
    there is one or, if they are counted as messages, none, and its seconds."""

    messages: float
    nbytes: float
    reduced: float
    latencies: float
    calls: float
    seconds: float


def fit(samples: Sequence[Sample], *, within_host: bool = False) -> Costs:
    """The costs that explain `samples` best, by relative error; none is negative.

    Costs that no sample can separate (γ and β, if every byte that is sent is also reduced) share their total. Of what a
    call takes at least, a part counts as λ: noise must not make many rounds look as cheap as one. Within a host a part
    of what a byte takes counts as γ: noise must not make it look free to reduce twice as many.
    """
    rows = np.array([sample[:-1] for sample in samples], dtype=np.float64).reshape(-1, 5)
    times = np.array([sample.seconds for sample in samples], dtype=np.float64)
    weighted, ones = rows / times[:, None], np.ones(len(samples))
    used = [column for column in range(rows.shape[1]) if weighted[:, column].any()]
    while used:
        found = np.linalg.lstsq(weighted[:, used], ones, rcond=None)[0]
        if (found >= 0).all():
            break
        # In non-negative least squares, a cost that would be negative without the constraint is set to zero.
        del used[int(found.argmin())]
    costs = dict(zip(used, map(float, found), strict=True)) if used else {}
    alpha, beta, gamma, latency, call = (costs.get(column, 0.0) for column in range(5))
    if within_host:
        unpriced = max(0.0, (beta + gamma) * _LEAST_REDUCING - gamma)
        beta, gamma = beta - unpriced, gamma + unpriced
    missing = max(0.0, call * _LEAST_LATENCY - alpha - latency)
    return alpha, beta, gamma, latency + missing, call - missing


def load(path: Path, key: str) -> Tuning | None:
    """The costs stored for `key`; None if there are none or the file is invalid."""
    try:
        found = json.loads(path.read_text())[key]
        return {_known(kind): rounded(costs) for kind, costs in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"costs of {kind!r}: expected one of {', '.join(KINDS)}")
    return kind


def rounded(costs: Sequence[float]) -> Costs:
    """`costs` rounded to three digits: more than their noise justifies, and short to send. Raises `ValueError`."""
    alpha, beta, gamma, latency, call = (float(f"{float(cost):.3g}") for cost in costs)
    if not all(0 <= cost < math.inf for cost in (alpha, beta, gamma, latency, call)):
        raise ValueError(f"expected five costs of 0 or more, got {costs}")
    return alpha, beta, gamma, latency, call


def store(path: Path, key: str, tuning: Tuning) -> str | None:
    """Adds `tuning` to the file, completely or not at all; returns the reason if it failed, else None."""
    try:
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        known.pop(key, None)
        known[key] = {name: list(costs) for name, costs in tuning.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(dict(list(known.items())[-_KEPT:]), indent=1) + "\n")
        unfinished.replace(path)
    except OSError as failure:
        return str(failure)
    return None
