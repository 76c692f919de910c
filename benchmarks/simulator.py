"""Speed of the simulator: CPU seconds of its event loop on the workloads that peers were timed on.

Llama-3-8B on A100-80G, chunks of 512 tokens, up to 512 sequences; W1 on one replica, W2 on eight, and, once, a million
synthetic requests on sixteen. Each run is a process of its own; the median of `--runs` is reported, with a pure-Python
loop timed beside it so that machines can be compared. What the compiler took is no part of it: a run before warms up.

    python benchmarks/simulator.py [--runs 5] [--million] [--out benchmarks/results/simulator.json]
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
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
WORKLOADS = {"W1": ("W1_conv2k_qps6.45.csv", 1), "W2": ("W2_conv10k_qps51.6.csv", 8)}
MILLION = ("name=chat,rate=64", 1_000_000, 16)  # a tenant at four requests a second for each replica
POLICIES = ("full", "shadowkv")
LOOP = 10_000_000


def one_run(trace: Path, gpus: int, policy: str) -> dict[str, float]:
    """The figures of one simulation in a fresh process."""
    command = [sys.executable, "-m", "kvsim", "simulate", "--trace", str(trace), "--gpus", str(gpus)]
    command += ["--model", "llama-3-8b", "--gpu", "a100-80g-sxm", "--policy", policy]
    command += ["--max-num-batched-tokens", "512", "--max-num-seqs", "512", "--fidelity", "step", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent) as process:
        out = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    summary = json.loads(out)
    return {
        "cpu_s": summary["cpu_s"],
        "setup_cpu_s": summary["setup_cpu_s"],
        "wall_s": summary["wall_s"],
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "requests": summary["requests"]["finished"],
        "output_tokens": summary["tokens"]["output"],
    }


def measured(workload: str, trace: Path, gpus: int, policy: str, runs: int) -> dict[str, float | str]:
    """Medians over `runs` runs, and a line of them."""
    figures = [one_run(trace, gpus, policy) for _ in range(runs)]
    cpu_s = statistics.median(run["cpu_s"] for run in figures)
    row: dict[str, float | str] = {
        "workload": workload,
        "policy": policy,
        "cpu_s": cpu_s,
        "cpu_s_min": min(run["cpu_s"] for run in figures),
        "cpu_s_max": max(run["cpu_s"] for run in figures),
        "setup_cpu_s": statistics.median(run["setup_cpu_s"] for run in figures),
        "wall_s": statistics.median(run["wall_s"] for run in figures),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in figures),
        "requests": figures[0]["requests"],
        "requests_per_cpu_s": figures[0]["requests"] / cpu_s,
        "output_tokens_per_cpu_s": figures[0]["output_tokens"] / cpu_s,
        "runs": runs,
        "loop_cpu_s": loop_cpu_s(),
    }
    sys.stdout.write(
        f"{workload} {policy:10s} {cpu_s:6.3f} CPU s ({row['cpu_s_min']:.3f}-{row['cpu_s_max']:.3f})  "
        f"{row['requests_per_cpu_s']:8,.0f} requests/s  {row['output_tokens_per_cpu_s']:10,.0f} tokens/s  "
        f"{row['peak_rss_bytes'] / 2**20:,.0f} MiB  (10 M additions: {row['loop_cpu_s']:.2f} s)\n"
    )
    sys.stdout.flush()
    return row


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
    parser.add_argument("--million", action="store_true", help="simulate a million requests as well")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "simulator.json")
    arguments = parser.parse_args()
    rows = []
    one_run(HERE / "workloads" / WORKLOADS["W1"][0], 1, POLICIES[0])
    for workload, (file, gpus) in WORKLOADS.items():
        rows += [measured(workload, HERE / "workloads" / file, gpus, p, arguments.runs) for p in POLICIES]
    if arguments.million:
        tenant, requests, gpus = MILLION
        with TemporaryDirectory() as folder:
            trace = Path(folder) / "million.parquet"
            command = [sys.executable, "-m", "kvsim", "trace", "synth", "--tenant", tenant, "--out", str(trace)]
            subprocess.run([*command, "--requests", str(requests)], check=True, cwd=HERE.parent, capture_output=True)
            rows.append(measured("million", trace, gpus, POLICIES[0], 1))
    report = {
        "schema_version": 1,
        "command": "python benchmarks/simulator.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
