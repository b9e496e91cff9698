"""`ringred serve` and `ringred keys`: parameter servers in processes of their own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ringred.testing.command.parsing import add_json, count, say

__all__ = ["add_serve"]


def add_serve(commands: Any) -> None:
    """Adds the commands to the others."""
    serve = commands.add_parser("serve", help="host a shard of a parameter server, in a process of its own")
    serve.add_argument("--workers", type=count, required=True, metavar="P", help="how many workers there will be")
    serve.add_argument("--policy", default="async", help="sync, async, or with a number k_async:3, soft_sync:1, ...")
    serve.add_argument("--elastic", action="store_true", help="go on with fewer workers than the policy asks for")
    serve.add_argument("--updates", type=count, metavar="N", help="the training is over after so many updates")
    serve.add_argument("--staleness-aware", choices=("mean", "per_gradient"), help="smaller steps for old gradients")
    serve.add_argument("--shards", type=count, default=1, metavar="S", help="servers in all (default 1)")
    serve.add_argument("--number", type=int, default=0, metavar="K", help="which of them this is, 0 to S - 1")
    serve.add_argument("--replicate", action="store_true", help="keep a copy of each server on the next one")
    serve.add_argument("--ranks-per-host", type=count, default=1, metavar="L", help="of workers that are whole hosts")
    serve.add_argument("--snapshots", type=Path, metavar="D", help="a folder of snapshots; goes on from the newest one")
    serve.add_argument("--every", type=count, metavar="N", help="write a snapshot after each N updates")
    serve.add_argument("--folder", type=Path, help="where servers and workers meet, if all see one file system")
    serve.add_argument("--addresses", default="", metavar="A,B", help="else all servers, such as tcp://10.0.0.1:7000")
    serve.add_argument("--listen", metavar="A", help="the address to listen on, if it is not the one that others use")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="the job's keys; without --folder")
    add_json(serve, "what it tells as lines of JSON")
    serve.set_defaults(command=_serve)

    keys = commands.add_parser("keys", help="make the keys of a job of a parameter server")
    keys.add_argument("file", type=Path, help="a new file, which only its owner can read")
    add_json(keys)
    keys.set_defaults(command=_keys)


def _serve(options: argparse.Namespace) -> int:
    from ringred.parameter_server.keys import load_keys
    from ringred.parameter_server.policies import parse
    from ringred.parameter_server.serving import serve

    return serve(
        parse(options.policy, elastic=options.elastic),
        options.workers,
        number=options.number,
        shards=options.shards,
        folder=options.folder,
        addresses=[address for address in options.addresses.split(",") if address],
        listen=options.listen,
        keys=None if options.keys is None else load_keys(options.keys),
        updates=options.updates,
        staleness_aware=options.staleness_aware,
        replicate=options.replicate,
        snapshots=options.snapshots,
        every=options.every,
        ranks_per_host=options.ranks_per_host,
        told=lambda text: print(json.dumps({"ringred": "serve", "text": text}) if options.json else text, flush=True),
    )


def _keys(options: argparse.Namespace) -> int:
    from ringred.parameter_server.keys import make_keys, save_keys

    save_keys(make_keys(), options.file)
    say(options, {"file": str(options.file)}, f"the keys of a job, for its servers and workers: {options.file}")
    return 0
