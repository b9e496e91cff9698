"""The `ringred` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ringred.errors import RingredError
from ringred.testing.command.doctor import add_doctor
from ringred.testing.command.parsing import Parser
from ringred.testing.command.proofs import add_proofs
from ringred.testing.command.run import add_run
from ringred.testing.command.serve import add_serve
from ringred.testing.command.status import add_status

__all__ = ["main", "make_parser"]

_PARTS: tuple[Callable[..., None], ...] = (add_proofs, add_run, add_status, add_serve, add_doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (RingredError, ValueError, OSError) as failure:
        print(f"ringred: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="ringred", description="Collective algorithms proved, priced, shown and run; trainings kept up."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _PARTS:
        add(commands)
    return parser
