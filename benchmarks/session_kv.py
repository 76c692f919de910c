"""What becomes of a session's KV between its turns, on a recorded trace of coding agents: one row for each choice.

1,000 requests of the agentic-coding trace in closed loop, Llama-3.1-8B on one, four and eight H100s; means over seeds,
which draw when sessions start. Prints the table of `docs/session_kv.md`.

    python benchmarks/session_kv.py [--limit N] [--seeds N]
"""

import argparse
import sys
from statistics import fmean

from kvsim import SESSION_KVS, load_scenario, simulate, summarize

BASE = {"trace": "agentic-coding", "model": "llama-3.1-8b", "gpu": "h100-sxm", "sessions": "closed"}
GPUS = (1, 4, 8)
HEAD = ("H100s", "session_kv", "TTFT mean, s", "p50", "e2e mean, s", "tokens cached", "turns resumed", "swapped, TB")


def figures(choice: str, gpus: int, limit: int, seed: int) -> list[float]:
    """One simulation's figures, in the order of the table."""
    options = {"session_kv": choice, "gpus": gpus, "limit": limit, "seed": seed, "router": "least-loaded"}
    asked = load_scenario({**BASE, **options})
    summary = summarize(simulate(asked.load_trace(), asked.setups()[0]))
    tokens, ttft_s = summary["tokens"], summary["ttft_s"]
    cached = tokens["prompt_cached"] / tokens["prompt"]
    moved_bytes = summary["swaps"]["bytes"]
    resumed = summary["session_kv"]["resumed"]
    return [ttft_s["mean"], ttft_s["p50"], summary["e2e_s"]["mean"], cached, resumed, moved_bytes / 1e12]


def main() -> None:
    """Simulate and print, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=1000, help="replay the first N requests")
    parser.add_argument("--seeds", type=int, default=5, help="from 0 on")
    asked = parser.parse_args()
    for line in (HEAD, ["---:", "---", *["---:"] * (len(HEAD) - 2)]):
        sys.stdout.write(f"| {' | '.join(line)} |\n")
    for gpus in GPUS:
        for choice in SESSION_KVS:
            runs = [figures(choice, gpus, asked.limit, seed) for seed in range(asked.seeds)]
            mean = [fmean(column) for column in zip(*runs, strict=True)]
            shown = [*(f"{x:.2f}" for x in mean[:3]), f"{mean[3]:.1%}", f"{mean[4]:.0f}", f"{mean[5]:.1f}"]
            sys.stdout.write(f"| {gpus} | {choice} | {' | '.join(shown)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
