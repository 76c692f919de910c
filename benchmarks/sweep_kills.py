"""Kill a sweep of 200 points at ten random moments, and compare its files with those of one that was never killed.

python benchmarks/sweep_kills.py [--out benchmarks/results/sweep_kills.json]
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.docs_tables.runs import commit

ROOT = Path(__file__).parents[1]
KILLS, SEED = 10, 15
BASE = ("--trace", "azure-2023-code", "--limit", "200", "--model", "llama-3.1-8b", "--gpu", "h100-sxm")
GRID = (
    *("--over", "gpus=1,2,4,8", "--over", "max_num_seqs=1,2,4,8,16", "--over", "rate_scale=1,2,4,8,16"),
    *("--over", "policy=full", "--over", "policy=quest:budget_tokens=512"),
)


def command(out: Path) -> list[str]:
    """The sweep, with its files in a folder."""
    return [sys.executable, "-m", "kvsim", "sweep", *BASE, *GRID, "--out", str(out)]


def digests(out: Path) -> dict[str, str]:
    """What each file of a folder holds."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def kept(out: Path) -> list[str]:
    """The points that the journal has whole, by their keys."""
    journal = out / "sweep.journal"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [json.loads(line.partition(b" ")[2])["key"] for line in lines]


def killed_run(out: Path, whole_s: float) -> list[dict[str, Any]]:
    """Start the sweep ten times and kill it at a random moment of each; then let it end."""
    draw, kills = np.random.default_rng(SEED), []
    while len(kills) < KILLS:
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command(out), cwd=ROOT, start_new_session=True, **quiet)
        after_s = float(draw.uniform(0, whole_s * 2 / KILLS))
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills.append({"after_s": after_s, "points_kept": len(kept(out))})
        else:
            raise SystemExit(f"the sweep ended after {len(kills)} kills; nothing was left to kill")
    subprocess.run(command(out), cwd=ROOT, check=True, capture_output=True)
    return kills


def main() -> None:
    """Sweep once in peace and once among kills, and keep what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sweep_kills.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "out"
        began_s = time.monotonic()
        subprocess.run(command(whole), cwd=ROOT, check=True, capture_output=True)
        whole_s = time.monotonic() - began_s
        kills = killed_run(out, whole_s)
        keys, points = kept(out), len(json.loads((out / "sweep.json").read_text(encoding="utf-8"))["points"])
        same = digests(whole)
        result = {
            "schema_version": 1,
            "commit": commit(),
            "command": "python benchmarks/sweep_kills.py",
            "device": "CPU",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "sweep": " ".join(["kvsim sweep", *BASE, *GRID]),
            "points": points,
            "uninterrupted_wall_s": whole_s,
            "kills": kills,
            "points_simulated_twice": len(keys) - len(set(keys)),
            "files": same,
            "same_bytes": same == digests(out),
        }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not result["same_bytes"]:
        raise SystemExit("the files differ")


if __name__ == "__main__":
    main()
