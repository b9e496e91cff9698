"""What holds on this machine's GPU, and how fast it is, in a few minutes: one command for whoever has a GPU.

    make gpu-check              # or: python benchmarks/gpu_check.py [--out out/gpu] [--only STEP ...] [--mps]

Every step is a process of its own with a limit, and writes its result to `out/gpu/STEP.json` as soon as it is there: a
step that crashes or hangs loses nothing of the others. Steps with ranks start them on the GPUs that there are, several
on one if need be. The exit status is 0 only if every step that checks something held. With `--fake` the same steps run
on the fake device of the tests, which says that this program works, and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from gpu_steps import SIZES
from tabulate import tabulate

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
sys.path.insert(1, str(ROOT))  # where ringred is not installed

from ringred.testing.ports import reserved_port  # noqa: E402

STEPS: dict[str, tuple[int, float, bool]] = {
    # ranks, seconds it may take, whether the exit status depends on it
    "device": (1, 60, True),
    "driver": (2, 60, True),
    "collectives-2": (2, 90, True),
    "collectives-4": (4, 120, True),
    "killed": (3, 60, True),
    "ddp-2": (2, 60, True),
    "figures-2": (2, 90, False),
    "figures-4": (4, 90, False),
    "tuned-2": (2, 90, False),
    "overlap-2": (2, 60, False),
    "overlap_by_gloo-2": (2, 60, False),
    "gloo-2": (2, 60, False),
    "nccl-2": (2, 60, False),
}


def run(step: str, folder: Path) -> dict[str, Any]:
    """Starts a step's ranks; what they found, and how it ended."""
    ranks, limit, _ = STEPS[step]
    out = folder / f"{step}.found"
    out.unlink(missing_ok=True)
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"XDG_CACHE_HOME": str((folder / "cache").resolve())} if "tuned" in step else {"RINGRED_TUNING": "off"}
    shared |= {
        "GPU_CHECK_OUT": str(out),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    began = time.monotonic()
    with (folder / f"{step}.log").open("wb") as log, reserved_port() as port:
        shared["MASTER_PORT"] = str(port)
        processes: list[subprocess.Popen[bytes]] = []
        program = "gpu_ddp.py" if step.startswith(("ddp", "overlap")) else "gpu_steps.py"
        command = [sys.executable, str(HERE.parent / program), step]
        late = False
        try:
            for rank in range(ranks):
                one = {"GPU_CHECK_OUT": str(out)}
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **(shared if ranks > 1 else one)}
                environment = {**os.environ, **own, "PYTHONPATH": shared["PYTHONPATH"]}
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            for process in processes:
                try:
                    process.wait(max(0.1, began + limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    late = True
        finally:
            for process in processes:
                process.kill()
                process.wait()
    statuses = [process.returncode for process in processes]
    wanted = [0] * (ranks - 1) + [-9] if step == "killed" else [0] * ranks
    found = json.loads(out.read_text()) if out.exists() else {}
    out.unlink(missing_ok=True)
    held = statuses == wanted and not late and bool(found)
    said = (folder / f"{step}.log").read_text(errors="replace").strip().splitlines()
    why = (
        "" if held else f"not done after {limit:.0f} s" if late else (said[-1] if said else f"exit statuses {statuses}")
    )
    return {"step": step, "held": held, "seconds": time.monotonic() - began, "why": why, "found": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--fake", action="store_true", help="on the fake device of the tests")
    parser.add_argument("--mps", action="store_true", help="let ranks use one GPU at once, not by turns (NVIDIA's MPS)")
    options = parser.parse_args()
    if options.fake:
        os.environ["GPU_CHECK_FAKE"] = "1"
    elif not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} sees no CUDA device on this machine: nothing was checked",
            file=sys.stderr,
        )
        return 3
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what was started ends too
    with at_once() if options.mps else nullcontext():
        return check(options)


@contextmanager
def at_once() -> Iterator[None]:
    """Within it, the processes that are started share a GPU without turns: by an MPS daemon of this program's own."""
    with tempfile.TemporaryDirectory(prefix="ringred-mps-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        numbered = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        try:
            subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, env=numbered)  # else it would count anew
            yield
        finally:
            for order in ("quit\n", "quit -t 5\n"):
                with suppress(subprocess.TimeoutExpired):
                    subprocess.run(["nvidia-cuda-mps-control"], input=order, text=True, check=False, timeout=30)
                    break


def check(options: argparse.Namespace) -> int:
    """Runs the steps that were asked for; the exit status."""
    results = []
    for step in options.only:
        result = run(step, options.out)
        results.append(result)
        (options.out / f"{step}.json").write_text(json.dumps(result, indent=1) + "\n")
        not_run = result["found"].get("not_run")
        outcome = f"not run: {not_run}" if not_run else "held" if result["held"] else f"FAILED: {result['why']}"
        print(f"{step:15} {result['seconds']:6.1f} s  {outcome}", flush=True)
    if any(STEPS[result["step"]][2] is False for result in results):
        found = {result["step"]: result["found"] for result in results}
        show(found)
        for step, whose in (("overlap-2", "ringred"), ("overlap_by_gloo-2", "torch on Gloo")):
            if found.get(step):
                told = ", ".join(f"{what} {value:.2f}" for what, value in found[step].items())
                print(f"a step of 2 ranks, {whose}: {told}")
        if found.get("tuned-2"):
            print(f"the first collective of 2 ranks, which measures costs: {found['tuned-2'].get('first_s', 0):.2f} s")
    failed = [result["step"] for result in results if STEPS[result["step"]][2] and not result["held"]]
    print(f"not held: {', '.join(failed)}; see {options.out}/STEP.log" if failed else "all that was checked held")
    return 1 if failed else 0


def show(found: dict[str, dict[str, Any]]) -> None:
    """The figures of all steps, by size."""
    copies = found.get("device", {}).get("copy_gb_per_s", {})
    rows = []
    for nbytes in SIZES:
        row: list[Any] = [nbytes]
        for step in ("figures-2", "figures-4"):
            row += [found.get(step, {}).get(str(nbytes), {}).get(memory) for memory in ("window", "tensor")]
        gloo_us = found.get("gloo-2", {}).get(str(nbytes))
        row += [gloo_us, None if gloo_us is None or row[2] is None else gloo_us / row[2]]
        limit = copies.get(str(nbytes))
        row.append(None if limit is None or row[1] is None else nbytes / (row[1] * 1e-6) / 1e9 / limit)
        rows.append(row)
    heads = [
        "bytes",
        "2 ranks: window µs",
        "tensor",
        "4 ranks: window",
        "tensor",
        "Gloo µs",
        "Gloo / tensor",
        "of a copy",
    ]
    print(tabulate(rows, headers=heads, floatfmt=".2f", missingval="-"))


if __name__ == "__main__":
    sys.exit(main())
