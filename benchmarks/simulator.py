"""Speed of the simulator: CPU seconds of its event loop on the workloads that peers were timed on.

Llama-3-8B on A100-80G, chunks of 512 tokens, up to 512 sequences; W1 on one replica, W2 on eight. Each run is a
process of its own; the median of `--runs` is reported, with a pure-Python loop timed beside it so that machines can be
compared.

    python benchmarks/simulator.py [--runs 5] [--out benchmarks/results/simulator.json]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
WORKLOADS = {"W1": ("W1_conv2k_qps6.45.csv", 1), "W2": ("W2_conv10k_qps51.6.csv", 8)}
POLICIES = ("full", "shadowkv")
LOOP = 10_000_000


def one_run(workload: str, policy: str) -> dict[str, float]:
    """The figures of one simulation in a fresh process."""
    file, gpus = WORKLOADS[workload]
    command = [sys.executable, "-m", "kvsim", "simulate", "--trace", str(HERE / "workloads" / file)]
    command += ["--model", "llama-3-8b", "--gpu", "a100-80g-sxm", "--gpus", str(gpus), "--policy", policy]
    command += ["--max-num-batched-tokens", "512", "--max-num-seqs", "512", "--fidelity", "step", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent)
    summary = json.loads(done.stdout)
    return {
        "cpu_s": summary["cpu_s"],
        "setup_cpu_s": summary["setup_cpu_s"],
        "requests": summary["requests"]["finished"],
        "output_tokens": summary["tokens"]["output"],
    }


def loop_cpu_s() -> float:
    """CPU seconds of ten million additions in this interpreter, now."""
    began = time.process_time()
    total = 0
    for i in range(LOOP):
        total += i
    return time.process_time() - began


def commit() -> str:
    """The commit that is measured, marked when the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return described.stdout.strip() or "unknown"


def main() -> None:
    """Time every workload under every policy and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "simulator.json")
    arguments = parser.parse_args()
    rows = []
    for workload in WORKLOADS:
        for policy in POLICIES:
            runs = [one_run(workload, policy) for _ in range(arguments.runs)]
            cpu_s = statistics.median(run["cpu_s"] for run in runs)
            row = {
                "workload": workload,
                "policy": policy,
                "cpu_s": cpu_s,
                "cpu_s_min": min(run["cpu_s"] for run in runs),
                "cpu_s_max": max(run["cpu_s"] for run in runs),
                "setup_cpu_s": statistics.median(run["setup_cpu_s"] for run in runs),
                "requests_per_cpu_s": runs[0]["requests"] / cpu_s,
                "output_tokens_per_cpu_s": runs[0]["output_tokens"] / cpu_s,
                "loop_cpu_s": loop_cpu_s(),
            }
            rows.append(row)
            sys.stdout.write(
                f"{workload} {policy:10s} {cpu_s:6.2f} CPU s ({row['cpu_s_min']:.2f}-{row['cpu_s_max']:.2f})  "
                f"{row['requests_per_cpu_s']:8,.0f} requests/s  {row['output_tokens_per_cpu_s']:10,.0f} tokens/s  "
                f"(10 M additions: {row['loop_cpu_s']:.2f} s)\n"
            )
            sys.stdout.flush()
    report = {
        "schema_version": 1,
        "command": "python benchmarks/simulator.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "runs": arguments.runs,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
