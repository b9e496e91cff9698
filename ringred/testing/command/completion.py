"""`ringred completion`: what a shell needs to complete the command's arguments."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_completion"]

_SHELLS = {
    "bash": 'eval "$(ringred completion bash)"',
    "zsh": "ringred completion zsh > ~/.zfunc/_ringred",
    "tcsh": "ringred completion tcsh > ~/.ringred.tcsh, and source it",
}


def add_completion(commands: Any) -> None:
    """Adds the command to the others."""
    told = "; ".join(f"{shell}: {how}" for shell, how in _SHELLS.items())
    completion = commands.add_parser("completion", help="print a shell's completions", epilog=told)
    completion.add_argument("shell", choices=tuple(_SHELLS))
    completion.set_defaults(command=_completion)


def _completion(options: argparse.Namespace) -> int:
    import shtab

    from ringred.testing.command.main import make_parser

    print(shtab.complete(make_parser(), shell=options.shell))
    return 0
