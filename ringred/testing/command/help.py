"""`ringred help`: what each message of an exception means, and what to do, by `errors.md`, a page of the site."""

from __future__ import annotations

import argparse
import re
import textwrap
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from ringred import errors
from ringred.errors import nearest
from ringred.testing.command.parsing import add_json, say

__all__ = ["Advice", "Kind", "add_help", "kinds"]

_WIDTH = 100


class Advice(NamedTuple):
    """What to do about messages that have any of the texts `says`, in which … stands for anything."""

    says: tuple[str, ...]
    cause: str
    cure: str


class Kind(NamedTuple):
    """A kind of exception, what it means at all, and the advice on each of its messages."""

    name: str
    meaning: str
    advice: tuple[Advice, ...]


@lru_cache(maxsize=1)
def kinds() -> dict[str, Kind]:
    """All kinds by name, in the order of the page."""
    page = (files("ringred.testing.command") / "errors.md").read_text("utf-8")
    found = {}
    for section in page.split("\n## ")[1:]:
        name, _, body = section.partition("\n")
        rows = [line for line in body.splitlines() if line.startswith("| `")]
        meaning = " ".join(line for line in body.splitlines() if line and not line.startswith("|"))
        found[name] = Kind(name, meaning, tuple(map(_advice, rows)))
    return found


def _advice(row: str) -> Advice:
    says, cause, cure = (cell.strip() for cell in row.strip("| ").split(" | "))
    return Advice(tuple(re.findall(r"`([^`]+)`", says)), cause, cure)


def add_help(commands: Any) -> None:
    """Adds the command to the others."""
    tell = commands.add_parser("help", help="what an exception of ringred means, and what to do")
    tell.add_argument("kind", nargs="?", metavar="KIND", help="such as PeerFailed; all are listed where it is left out")
    add_json(tell)
    tell.set_defaults(command=_help)


def _help(options: argparse.Namespace) -> int:
    known = kinds()
    if options.kind is None:
        asked = list(known.values())
        width = max(map(len, known))
        text = "\n".join(f"{kind.name:{width}}  {kind.meaning or kind.advice[0].cause}" for kind in asked)
        text += "\n\n`ringred help PeerFailed` tells all of one; `ringred doctor` tries what works here."
    else:
        match = {name.lower(): kind for name, kind in known.items()}.get(_told_with(options.kind).lower())
        if match is None:
            raise ValueError(
                f"help: there is no kind {options.kind!r}{nearest(options.kind, known)}; there are {', '.join(known)}"
            )
        asked, text = [match], _told(match)
    result = [
        {"kind": kind.name, "meaning": kind.meaning, "messages": [advice._asdict() for advice in kind.advice]}
        for kind in asked
    ]
    say(options, result, text)
    return 0


def _told_with(name: str) -> str:
    """The kind that tells of `name`, which may be one of several that are told together."""
    classes = {one.lower(): getattr(errors, one) for one in errors.__all__}
    found = classes.get(name.lower())
    bases = found.__mro__ if isinstance(found, type) else ()
    return next((base.__name__ for base in bases if base.__name__ in kinds()), name)


def _told(kind: Kind) -> str:
    parts = [textwrap.fill(f"{kind.name}. {kind.meaning}" if kind.meaning else kind.name, _WIDTH)]
    for advice in kind.advice:
        lines = [(f'"{one}"', "", "  ") for one in advice.says]
        lines += [(advice.cause, "    why:         ", " " * 17), (advice.cure, "    what to do:  ", " " * 17)]
        parts.append(
            "\n".join(textwrap.fill(text, _WIDTH, initial_indent=a, subsequent_indent=b) for text, a, b in lines)
        )
    return "\n\n".join(parts)
