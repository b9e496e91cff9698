"""`ringred run`: starts the ranks of a job, and others in the place of those that fail."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import zipfile
from pathlib import Path
from typing import Any

from ringred.errors import TransportUnavailable
from ringred.runtime.config import run_environment
from ringred.testing.command.parsing import add_json, count, say
from ringred.testing.command.supervisor import Supervisor, Tell, say_facts, say_it
from ringred.testing.ports import reserved_port
from ringred.transports.membership.card import Card, place
from ringred.transports.membership.member import Member
from ringred.transports.membership.rendezvous import Rendezvous
from ringred.transports.membership.view import LINEAGE

__all__ = ["add_run", "run_here"]


def add_run(commands: Any) -> None:
    """Adds the commands to the others."""
    run = commands.add_parser("run", help="start a training on several ranks, and go on after failures")
    run.add_argument("--ranks", type=count, required=True, metavar="N", help="processes on this host")
    run.add_argument("--min", type=count, default=1, metavar="M", help="wait for others where fewer ranks are left")
    run.add_argument(
        "--restarts", type=int, default=3, metavar="R", help="start no more after R that failed in a row (3)"
    )
    run.add_argument(
        "--spares", type=int, default=0, metavar="S", help="processes that wait, with torch imported, to replace others"
    )
    run.add_argument("--hosts", type=count, default=1, metavar="H", help="hosts that run this same command")
    run.add_argument("--meet", metavar="HOST:PORT", help="where `ringred meet` listens, for several hosts")
    run.add_argument("--secret", type=Path, metavar="FILE", help="the job's secret, for several hosts")
    add_json(run, "what happens to ranks as lines of JSON on stderr; the script's own output is as it is")
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", nargs=argparse.REMAINDER, default=[], metavar="...")
    run.set_defaults(command=_run)

    meet = commands.add_parser("meet", help="where the hosts of a job of `ringred run` find each other")
    meet.add_argument("--listen", required=True, metavar="ADDRESS:PORT")
    meet.add_argument("--secret", type=Path, required=True, metavar="FILE", help="made if it is not there")
    add_json(meet, "where it listens, as JSON")
    meet.set_defaults(command=_meet)


def _run(options: argparse.Namespace) -> int:
    if options.restarts < 0:
        raise ValueError(f"run: expected --restarts ≥ 0, got {options.restarts}")
    if options.spares < 0:
        raise ValueError(f"run: expected --spares ≥ 0, got {options.spares}")
    if options.min > options.ranks * options.hosts:
        raise ValueError(f"run: expected --min of at most {options.ranks * options.hosts} ranks, got {options.min}")
    if (options.meet is None) != (options.secret is None) or (options.meet is None and options.hosts > 1):
        raise ValueError("run: several hosts need --meet HOST:PORT and --secret FILE (see `ringred meet`)")
    if not Path(options.script).exists():
        hint = "; SCRIPT is a Python file, which Python itself runs" if options.script.startswith("python") else ""
        raise ValueError(f"run: no file {options.script}{hint}")
    if options.spares and not _is_source(Path(options.script)):
        raise ValueError(f"run: --spares goes with a Python file, and {options.script} is none")
    command = [sys.executable, options.script, *options.arguments]
    tell = say_facts if options.json else say_it
    if options.meet is None:
        return run_here(command, options.ranks, options.min, options.restarts, tell, options.spares)
    host, port = _address(options.meet)
    rendezvous = Rendezvous(Card("", 0, "", "", host, port), _load(options.secret))
    first = rendezvous.number("hosts") * options.ranks
    size = options.ranks * options.hosts
    # Who starts when the job is at work already joins it, as the processes of a host do that came back.
    return _supervised(
        command, rendezvous, options.ranks, size, options.min, options.restarts, first, tell, options.spares
    )


def _is_source(script: Path) -> bool:
    """Whether it is no folder, archive or compiled file, which Python runs too."""
    return script.is_file() and script.suffix != ".pyc" and not zipfile.is_zipfile(script)


def run_here(
    command: list[str], ranks: int, least: int = 1, restarts: int = 0, tell: Tell = say_it, spares: int = 0
) -> int:
    """Runs `command` on `ranks` ranks of this host; others take the places of those that fail, up to `restarts` in a
    row; `spares` processes are ready for that, if it is Python with a script. What happens is told to `tell`. Returns
    the exit status."""
    keeper = Member(secrets.token_bytes(32))
    try:
        return _supervised(command, Rendezvous.kept_by(keeper), ranks, ranks, least, restarts, 0, tell, spares)
    finally:
        keeper.close()


def _supervised(
    command: list[str],
    rendezvous: Rendezvous,
    ranks: int,
    size: int,
    least: int,
    restarts: int,
    first: int,
    tell: Tell,
    spares: int,
) -> int:
    keeper_card, secret = rendezvous.keeper.as_text(), rendezvous.secret.hex()

    def members() -> list[int] | None:
        cards = rendezvous.members(LINEAGE)
        return [card.process for card in cards if card.place == place()] if cards else None

    late = first >= size
    with reserved_port() as port:
        environment = run_environment(ranks, least, keeper_card, secret, port)
        return Supervisor(command, environment, first % size, ranks, size, restarts, members, late, tell, spares).run()


def _meet(options: argparse.Namespace) -> int:
    host, port = _address(options.listen)
    if not options.secret.exists():
        with open(os.open(options.secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    keeper = Member(_load(options.secret), host, port)
    place_told = f"{host}:{keeper.card.port}"
    say(options, {"listening": place_told}, f"ringred meet: at {place_told}")
    try:
        keeper.wait()
    except KeyboardInterrupt:
        pass
    finally:
        keeper.close()
    return 0


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"expected HOST:PORT, got {text!r}")
    return host, int(port)


def _load(path: Path) -> bytes:
    """The secret in a file. Raises `TransportUnavailable` if others may read it, or if it holds none."""
    if os.stat(path).st_mode & 0o077:
        raise TransportUnavailable(f"{path}: other users may read this secret; chmod 600 {path}")
    try:
        secret = bytes.fromhex(path.read_text().strip())
    except ValueError:
        secret = b""
    if len(secret) < 16:
        raise TransportUnavailable(f"{path}: expected a secret of at least 32 hexadecimal digits")
    return secret
