"""Runs torch's own distributed tests on ringred and on Gloo, and compares them, test by test.

    python tests/torch_suite/compare.py --ranks 2 3 4

Ends with status 1 if a test that passes on Gloo does not pass on ringred. About three minutes for each number of ranks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

BACKENDS = ("gloo", "ringred")


def run(backend: str, ranks: int, tests: list[str]) -> dict[str, dict[str, Any]]:
    """What came of each test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("one_backend.py")), backend, str(ranks), str(path)]
        ended = subprocess.run([*command, *tests], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if ended.returncode or not path.exists():
            raise SystemExit(f"{backend}, {ranks} ranks: status {ended.returncode}: {ended.stderr.decode()[-3000:]}")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["test"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--tests", nargs="*", default=[], help="their names; all, if none is given")
    parser.add_argument("--json", type=Path, help="write what came of each test")
    options = parser.parse_args()
    worse, kept = 0, {}
    for ranks in options.ranks:
        found = {backend: run(backend, ranks, options.tests) for backend in BACKENDS}
        kept[ranks] = {
            test: {backend: found[backend][test]["outcome"] for backend in BACKENDS} for test in found["gloo"]
        }
        for backend in BACKENDS:
            counts = Counter(row["outcome"] for row in found[backend].values())
            said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            print(f"{ranks} ranks, {backend}: {said}", flush=True)
        for test, theirs in found["gloo"].items():
            ours = found["ringred"][test]
            if theirs["outcome"] == "passed" and ours["outcome"] != "passed":
                worse += 1
                print(f"{ranks} ranks, {test}: passes on Gloo, {ours['outcome']} on ringred: {ours['said'][-500:]}")
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    if worse:
        raise SystemExit(f"{worse} tests pass on Gloo and not on ringred")
    print("every test that passes on Gloo passes on ringred")


if __name__ == "__main__":
    main()
