"""The `ringred` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import ringred
from ringred.errors import RingredError
from ringred.testing.command.bench import add_bench
from ringred.testing.command.completion import add_completion
from ringred.testing.command.doctor import add_doctor
from ringred.testing.command.help import add_help
from ringred.testing.command.parsing import Parser
from ringred.testing.command.proofs import add_proofs
from ringred.testing.command.run import add_run
from ringred.testing.command.serve import add_serve
from ringred.testing.command.status import add_status
from ringred.testing.command.trace import add_trace

__all__ = ["main", "make_parser"]

_PARTS: tuple[Callable[..., None], ...] = (
    add_proofs,
    add_bench,
    add_run,
    add_status,
    add_trace,
    add_serve,
    add_doctor,
    add_help,
    add_completion,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    options.arguments_given = list(sys.argv[1:] if arguments is None else arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except BrokenPipeError:  # who read it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RingredError, ValueError, OSError) as failure:
        notes = "".join(f"\n({note})" for note in getattr(failure, "__notes__", ()))
        print(f"ringred: {failure}{notes}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="ringred", description="Collective algorithms proved, priced, shown and run; trainings kept up."
    )
    parser.add_argument("--version", action="version", version=f"ringred {ringred.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _PARTS:
        add(commands)
    return parser
