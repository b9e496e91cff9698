"""Every message of an exception of ringred has advice."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringred import errors
from ringred.errors import PeerFailed
from ringred.testing.command.help import kinds
from ringred.testing.command.main import main

PACKAGE = Path(errors.__file__).parent
TOLD_AS = {
    "DeadlockError": "ScheduleError",
    "OverwriteError": "ScheduleError",
    "PeersUnreachable": "TransportUnavailable",
}


def kinds_of(path: Path) -> list[str]:
    """The exceptions that a file defines."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    bases = {name for name in errors.__all__ if name[0].isupper()}
    return [one.name for one in classes if any(isinstance(base, ast.Name) and base.id in bases for base in one.bases)]


KINDS = {"RingredError", *(name for path in PACKAGE.rglob("*.py") for name in kinds_of(path))}


def template(text: ast.expr) -> str | None:
    """The text of a message with … for what is put in, or None if none of it is written there."""
    if isinstance(text, ast.Constant):
        return str(text.value)
    if isinstance(text, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in text.values)
    return None


def messages() -> Iterator[tuple[str, str, str]]:
    """Kind, place and template of each message."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
                text = template(node.args[0])
                if text is not None:
                    yield node.func.id, f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def says(advice: str, text: str) -> bool:
    """Whether the parts of the advice are in the message, in their order; if it has none, nor has the message."""
    parts = [re.escape(part.strip()) for part in advice.split("…") if part.strip(": ")]
    return re.search(".*".join(parts), text) is not None if parts else not text.strip("…: ")


def test_every_kind_is_told() -> None:
    assert kinds().keys() == KINDS - TOLD_AS.keys()
    assert all(kind.advice for kind in kinds().values())
    assert all(advice.cause and advice.cure for kind in kinds().values() for advice in kind.advice)


def test_every_message_has_advice() -> None:
    found = [(TOLD_AS.get(kind, kind), place, text) for kind, place, text in messages()]
    assert len(found) > 170
    bare = [
        one for one in found if not any(says(text, one[2]) for advice in kinds()[one[0]].advice for text in advice.says)
    ]
    assert bare == []


def test_all_advice_is_on_a_message() -> None:
    texts: dict[str, list[str]] = {}
    for name, _, text in messages():
        texts.setdefault(TOLD_AS.get(name, name), []).append(text)
    idle = [
        (kind.name, one)
        for kind in kinds().values()
        for advice in kind.advice
        for one in advice.says
        if not any(says(one, text) for text in texts[kind.name])
    ]
    assert idle == []


def test_a_traceback_ends_with_where_to_read_more() -> None:
    with pytest.raises(PeerFailed) as raised:
        raise PeerFailed("rank 2: all_reduce #1: rank 0 is gone (killed)")
    last = "".join(traceback.format_exception(raised.value)).strip().splitlines()[-1]
    if hasattr(raised.value, "__notes__"):  # Python 3.11
        assert last == "What it means, and what to do: ringred help PeerFailed"
    assert str(raised.value) == "rank 2: all_reduce #1: rank 0 is gone (killed)"


@pytest.mark.parametrize(("kind", "told"), [("DeadlockError", "ScheduleError"), ("damaged", "Damaged")])
def test_the_command_tells_of_what_a_traceback_names(capsys: pytest.CaptureFixture[str], kind: str, told: str) -> None:
    assert main(["help", kind]) == 0
    assert capsys.readouterr().out.startswith(f"{told}. ")


def test_a_kind_of_ones_own_is_told_as_what_it_is() -> None:
    class Mine(PeerFailed):
        pass

    assert getattr(Mine("x"), "__notes__", ["ringred help PeerFailed"])[0].endswith("ringred help PeerFailed")


def test_the_command_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "peerfailed"]) == 0
    told = capsys.readouterr().out
    assert "PeerFailed" in told
    assert 'given up: rank … raised …"' in told
    assert main(["help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in kinds())
    assert main(["help", "PeerFaild"]) == 2
    assert "did you mean 'PeerFailed'?" in capsys.readouterr().err
