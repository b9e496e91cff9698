"""Says in three sentences what `make demo` has shown, by the files that it wrote to a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    out = Path(sys.argv[1])
    trained = {name: json.loads((out / f"digits-{name}.json").read_text()) for name in ("ring", "torus", "tree")}
    scaling = json.loads((out / "scaling.json").read_text())
    rows = {row["algorithm"]: row for row in scaling["rows"]}
    best = max(scaling["rows"], key=lambda row: row["efficiency"])
    central = rows["server, one shard"]
    accuracies = ", ".join(f"{result['accuracy']:.1%} by {name}" for name, result in trained.items())
    cores = scaling["machine"]["usable_cores"]
    shared = " (both share the cores with all else here)" if cores <= scaling["ranks"] else ""
    at = {(row["algorithm"], row["ranks"]): row["efficiency"] for row in scaling["simulated"]}
    most = max(ranks for _, ranks in at)
    torus, ring, one = (f"{at[name, most]:.1%}" for name in ("torus", "ring", "central"))
    print(
        f"""
What you have seen
  1. Two processes trained one model together, however they add their gradients: {accuracies}.
  2. A step on two ranks kept {best["efficiency"]:.0%} of one rank's speed by {best["algorithm"]},
     and {central["efficiency"]:.0%} with all gradients on one server{shared}.
  3. Simulated on {most} ranks, {torus} are left by torus, {ring} by ring and {one} by one server:
     {out / "scaling.png"}.

What to try next
  {out / "ring.html"} in a browser: the ring, message by message (`ringred explain` makes others)
  .venv/bin/ringred bench ddp: a step beside torch's DDP on Gloo, on this machine
  docs/tutorial.md, or `make docs` and out/site/index.html"""
    )


if __name__ == "__main__":
    main()
