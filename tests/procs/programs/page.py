"""Runs the code of a page of documentation, on the ranks that there are, and compares what rank 0 prints.

A block of `python` is run; a block of `text` after it is what rank 0 prints, in which `...` stands for anything. Of a
block of `console` each line `$ ringred ...` is run on one rank. A comment `<!-- run` ... `-->` is code that is run but
not shown, `<!-- not run: why -->` leaves out the block after it. Prints how many blocks were run.
"""

import contextlib
import doctest
import io
import re
import shlex
import sys
from pathlib import Path

from ringred.testing.command.main import main as ringred

BLOCK = re.compile(
    r"<!-- run\n(?P<hidden>.*?)-->|<!-- not run: (?P<why>[^\n]*?) -->\s*```\w+\n.*?```"
    r"|^```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page):
    """(line, kind, text) of what is to be run, or compared with what was printed."""
    for found in BLOCK.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        if found["hidden"] is not None:
            yield line, "python", found["hidden"]
        elif found["why"] is None:
            yield line, found["kind"], found["text"]


def printed_as(wanted, got):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(wanted, got, flags)


def console(text):
    """The commands of a block of the console, with what they should print."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, wanted = part.partition("\n")
        yield shlex.split(command), wanted


def run(path, rank):
    names, said, count = {"__name__": "__main__"}, "", 0
    for line, kind, text in blocks(path.read_text()):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * line + text, str(path), "exec"), names)
            said, count = out.getvalue(), count + 1
        elif kind == "text" and rank == 0:
            assert printed_as(text, said), f"{path}:{line}: expected\n{text}\ngot\n{said}"
        elif kind == "console" and rank == 0:
            for command, wanted in console(text):
                assert command[0] == "ringred", f"{path}:{line}: {command}"
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    status = ringred(command[1:])
                assert status == 0, f"{path}:{line}: {command} ended with {status}"
                assert printed_as(wanted, out.getvalue()), f"{path}:{line}: expected\n{wanted}\ngot\n{out.getvalue()}"
                count += 1
    return count


if __name__ == "__main__":
    import ringred as library

    page = Path(sys.argv[1])
    alone = "<!-- ranks: 1 -->" in page.read_text()
    rank = 0 if alone else library.init().rank
    count = run(page, rank)
    if rank == 0:
        print(f"{count} blocks of {page} were run\n", end="", flush=True)
