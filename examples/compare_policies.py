"""Replay one trace under several policies, and see which of them meets its SLO at a growing rate of requests.

python examples/compare_policies.py [REQUESTS]
"""

import sys
from dataclasses import replace

import traces
from kvsim import Setup, load_gpu, load_host, load_model, simulate, summarize
from policies import parse_policy

POLICIES = ("full", "sink-window:window_tokens=4Ki", "shadowkv", "full@below=8k+shadowkv")
RATES = (0.5, 1.0, 2.0)


def main(requests: int = 200) -> None:
    """Simulate the first `requests` requests of the trace at each rate, under each policy."""
    trace = traces.load("mooncake-conversation", limit=requests)
    base = Setup(
        model=load_model("llama-3.1-8b"),
        policy=parse_policy(POLICIES[0]),
        gpu=load_gpu("h100-sxm"),
        host=load_host("ddr5-dual-xeon"),
        gpus=4,
    )
    print(f"{'requests/s within the SLO':<34}" + "".join(f"{f'rate x {rate:g}':>14}" for rate in RATES))
    for text in POLICIES:
        setup = replace(base, policy=parse_policy(text))
        results = [simulate(trace.scaled_rate(rate), setup) for rate in RATES]
        goodput = [summarize(result, slo={"ttft_s": 5.0, "tpot_s": 0.05})["goodput_rps"] for result in results]
        print(f"{text:<34}" + "".join(f"{rps:>14.2f}" for rps in goodput))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
