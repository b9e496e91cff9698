"""`ringred status`: what the ranks of a job on this host are doing, asked from outside at any time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ringred.testing.command.parsing import add_json, count, say
from ringred.transports.membership.caller import Connection, Cut, Gone, Refused, Silent
from ringred.transports.membership.wire import Malformed

__all__ = ["add_status"]

_SECONDS = 5.0  # for a rank to ask all others


def add_status(commands: Any) -> None:
    """Adds the command to the others."""
    status = commands.add_parser("status", help="what the ranks of a job are doing now")
    status.add_argument(
        "process", type=count, nargs="?", metavar="PID", help="a rank on this host; all jobs if left out"
    )
    add_json(status, "all that they answer, stacks too")
    status.set_defaults(command=_status)


def _status(options: argparse.Namespace) -> int:
    names = _listeners()
    if options.process is not None:
        names = {name: process for name, process in names.items() if process == options.process}
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    silent: list[int] = []
    for name, process in names.items():
        if process in seen:
            continue
        try:
            with Connection(name, None, _SECONDS) as connection:
                job = connection.ask({"do": "everyone"}, _SECONDS)
        except (Gone, Refused, Malformed):  # it has just ended, or is another user's
            continue
        except (Silent, Cut):
            silent.append(process)
            continue
        if "ranks" not in job:  # it keeps a rendezvous
            continue
        seen |= {rank["process"] for rank in job["ranks"]}
        found.append(job)
    alone = [{"process": process, "silent": "it does not answer"} for process in silent if process not in seen]
    found += [{"communicator": "no rank answers", "ranks": [one]} for one in alone]
    if not found:
        who = "no job of this user is" if options.process is None else f"process {options.process} is no rank that is"
        raise ValueError(f"status: {who} running here with more than one rank")
    say(options, found, "\n\n".join(map(_table, found)))
    return 0


def _listeners() -> dict[str, int]:
    """The Unix sockets at which ranks of this host listen, with their processes."""
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        name = line.split()[-1].removeprefix("@")
        parts = name.split("-")
        if name.startswith("ringred-") and len(parts) == 4 and parts[1].isdigit() and " 01 " in line[28:]:
            found[name] = int(parts[1])
    return found


def _table(job: dict[str, Any]) -> str:
    rows = [_row(rank, told) for rank, told in enumerate(job["ranks"])]
    heads = ["rank", "host", "process", "step", "collective", "since s", "program"]
    return f"{job['communicator']}, {len(rows)} ranks\n" + str(tabulate(rows, headers=heads, disable_numparse=True))


def _row(rank: int, told: dict[str, Any]) -> tuple[object, ...]:
    if "silent" in told:
        return rank, "", told["process"], "", told["silent"], "", ""
    step, calls = told.get("step", ""), told["calls"]
    busy = max((call for call in calls if call["under_way"]), key=lambda call: call["seconds"], default=None)
    if busy is not None:
        what, since = f"in {busy['call']} at {busy['site']}", f"{busy['seconds']:.1f}"
    else:
        last = max(calls, key=lambda call: call["number"], default=None)
        what, since = ("none" if last is None or not last["number"] else f"after {last['call']}"), ""
    return rank, told["host"], told["process"], step, what, since, told["stack"][0] if told["stack"] else ""
