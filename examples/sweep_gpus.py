"""Which GPU serves a trace within its SLO, and at what rate: python examples/sweep_gpus.py [REQUESTS]"""

import sys

import traces
from kvsim import Setup, default_host, load_gpu, load_host, load_model, simulate, summarize
from policies import Full

trace = traces.load("azure-2023-code", limit=int(sys.argv[1]) if len(sys.argv) > 1 else 500)
for name in ("l40s", "a100-80g-sxm", "h100-sxm", "h200-sxm"):
    host = load_host(default_host(name))
    setup = Setup(model=load_model("llama-3.1-8b"), policy=Full(), gpu=load_gpu(name), host=host)
    summary = summarize(simulate(trace, setup), slo={"ttft_s": 5.0, "tpot_s": 0.2})
    print(f"{name:<14} {summary['goodput_rps']:6.2f} requests/s, {summary['slo_attainment']:.0%} within the SLO")
