"""Processes that have imported what every rank imports, and wait to take the place of one that ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ringred.runtime.config import take_variables

__all__ = ["Spares", "become_a_rank"]

# As for `python SCRIPT`, the script's folder comes first, and not the one that one is in.
_PROGRAM = """\
import sys
if not getattr(sys.flags, "safe_path", False):
    sys.path[0] = sys.argv[1]
from ringred.testing.command.spare import become_a_rank
become_a_rank(int(sys.argv[2]), sys.argv[3:])
"""


class Spares:
    """`wanted` processes that are ready to run `script`, a Python file and its arguments, as ranks.

    They are started with `environment`; `begin` is called in each before anything else. What happens to them is told to
    `tell`: a sentence, and facts.
    """

    def __init__(
        self,
        wanted: int,
        script: Sequence[str],
        environment: Mapping[str, str],
        begin: Callable[[], None],
        tell: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._wanted, self._script, self._environment = wanted, list(script), dict(environment)
        self._begin, self._tell = begin, tell
        self._ready: list[tuple[subprocess.Popen[bytes], int]] = []  # with the pipe by which each is told

    def keep(self) -> None:
        """Starts as many as are missing. One that fails is not replaced."""
        for process, writer in [one for one in self._ready if one[0].poll() is not None]:
            self._ready.remove((process, writer))
            self._lost(process, writer)
        while len(self._ready) < self._wanted:
            try:
                self._ready.append(self._start())
            except OSError as failure:
                self._give_up(str(failure))

    def _lost(self, process: subprocess.Popen[bytes], writer: int) -> None:
        said = _drop(process, writer).decode(errors="replace").strip().splitlines()
        self._give_up(f"it ended with status {process.returncode}{f': {said[-1]}' if said else ''}")

    def _give_up(self, why: str) -> None:
        self._wanted -= 1
        self._tell(f"one spare process fewer: {why}", {"event": "spare lost", "left": self._wanted})

    def _start(self) -> tuple[subprocess.Popen[bytes], int]:
        folder = os.path.dirname(os.path.realpath(self._script[0]))
        reader, writer = os.pipe()
        try:
            command = [sys.executable, "-c", _PROGRAM, folder, str(reader), *self._script]
            process = subprocess.Popen(
                command, env=self._environment, stderr=subprocess.PIPE, pass_fds=(reader,), preexec_fn=self._begin
            )
        except BaseException:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        return process, writer

    def take(self, variables: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """One of them, which runs the script from now on with these `variables` in its environment; None if there is
        none."""
        while self._ready:
            process, writer = self._ready.pop(0)
            if process.poll() is None:
                with contextlib.suppress(BrokenPipeError):
                    os.write(writer, json.dumps(dict(variables)).encode())  # less than any pipe holds
                    os.close(writer)
                    return process
            self._lost(process, writer)
        return None

    def end(self) -> None:
        """Ends those that were not needed."""
        while self._ready:
            _drop(*self._ready.pop())


def _drop(process: subprocess.Popen[bytes], writer: int) -> bytes:
    """Ends a process, if it has not; what it said."""
    os.close(writer)
    process.kill()
    return process.communicate()[1]


def become_a_rank(reader: int, script: Sequence[str]) -> None:
    """What a spare process does: imports, waits for the variables of a rank, and runs the script as Python would."""
    import ringred

    for name in ringred.__all__:
        getattr(ringred, name)
    with os.fdopen(reader, "rb") as orders:
        order = orders.read()
    if not order:
        return  # its supervisor has ended
    take_variables(json.loads(order))
    sys.argv[:] = script
    module = ModuleType("__main__")
    module.__file__ = os.path.abspath(script[0])
    sys.modules["__main__"] = module
    with open(script[0], "rb") as file:
        code = compile(file.read(), module.__file__, "exec", dont_inherit=True)
    exec(code, module.__dict__)
