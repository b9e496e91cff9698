"""How the command reads its arguments, and tells of wrong ones: what was expected, and the name that was meant."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from ringred.errors import nearest

__all__ = ["Parser", "add_json", "count", "grid", "say", "seconds", "size", "size_of"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Parser(argparse.ArgumentParser):
    """Ends with status 2 and one sentence where arguments are wrong, which names the nearest that there is."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, left = super().parse_known_args(args, namespace)
        if left:
            known = [text for action in self._actions for text in action.option_strings]
            name = left[0].partition("=")[0]
            what = "option" if name.startswith("-") else "argument"
            self.error(f"there is no {what} {name!r}{nearest(name, known) if what == 'option' else ''}")
        return found, left

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(name) for name in action.choices]
        what = f"value of {action.option_strings[-1]}" if action.option_strings else action.dest
        if isinstance(action, argparse._SubParsersAction):
            what = "command"
        self.error(f"there is no {what} {value!r}{nearest(str(value), names) or '; there are ' + ', '.join(names)}")

    def error(self, message: str) -> NoReturn:
        """Says it, with the usage, and where to read more."""
        self.exit(2, f"{self.format_usage()}{self.prog}: {message}\n(`{self.prog} --help` tells more)\n")


def add_json(parser: argparse.ArgumentParser, what: str = "the result as JSON") -> None:
    """Adds `--json` to a command."""
    parser.add_argument("--json", action="store_true", help=what)


def say(options: argparse.Namespace, result: Any, text: str) -> None:
    """Prints `result` as JSON where that was asked for, else `text`."""
    print(json.dumps(result, indent=1, ensure_ascii=False) if options.json else text, flush=True)


def count(text: str) -> int:
    if not _is_whole(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number ≥ 1, got {text!r}")
    return int(text)


def size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in _UNITS or not _is_whole(number):
        raise argparse.ArgumentTypeError(f"expected a size such as 4, 64K, 25M or 1G, got {text!r}")
    return int(number) * _UNITS[unit]


def grid(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(map(_is_whole, parts)):
        raise argparse.ArgumentTypeError(f"expected a grid such as 4x3, got {text!r}")
    return tuple(int(part) for part in parts)


def seconds(text: str) -> float:
    """A number of seconds, not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds ≥ 0, such as 20e-6, got {text!r}")
    return value


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def size_of(nbytes: int) -> str:
    """As in "25 MiB", or in bytes if it is no whole number of them."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= factor and nbytes % factor == 0:
            return f"{nbytes // factor} {unit}"
    return f"{nbytes} B"
