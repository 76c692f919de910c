"""Replay the head of a recorded trace on four GPUs, and print what its users waited for and what the memory held.

python examples/replay_trace.py [REQUESTS]
"""

import sys

import numpy as np

import traces
from kvsim import Setup, load_gpu, load_host, load_model, simulate, summarize
from policies import ShadowKV


def main(requests: int = 200) -> None:
    """Simulate the first `requests` requests of the trace."""
    trace = traces.load("mooncake-conversation", limit=requests)
    setup = Setup(
        model=load_model("llama-3.1-8b"),
        policy=ShadowKV(budget_tokens=1024),
        gpu=load_gpu("h100-sxm"),
        host=load_host("ddr5-dual-xeon"),
        gpus=4,
    )
    result = simulate(trace, setup)
    summary = summarize(result, slo={"ttft_s": 10.0, "tpot_s": 0.1})
    print(f"{summary['requests']['finished']} of {len(trace)} requests finished in {summary['makespan_s']:.1f} s")
    print(f"{summary['goodput_rps']:.2f} requests/s within the SLO")
    for name in ("ttft_s", "tpot_s"):
        print(f"{name}: p50 {summary[name]['p50']:.4f}, p99 {summary[name]['p99']:.4f}")
    for node, memory in summary["memory"].items():
        print(f"{node}: {memory['peak_bytes'] / 2**30:.1f} GiB at the peak")
    # Single requests are columns of equal length: here the prompt that waited longest for its first token.
    waits_s = result.requests["first_token_s"] - result.requests["arrival_s"]
    slowest = np.nanargmax(waits_s)  # a rejected request has no first token
    print(f"longest wait: {waits_s[slowest]:.2f} s, for {result.requests['prompt_tokens'][slowest]:,} tokens")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
