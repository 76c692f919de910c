"""The clients of ServeGen's reasoning service under each scheduler: who waits, and for whom.

python examples/compare_schedulers.py [LIMIT]
"""

import sys
from pathlib import Path

from kvsim import SCHEDULERS, format_s, load_scenario, simulate, summarize

SHOWN = 8
file = Path(__file__).with_name("tenants.yaml")
limit = {"limit": int(sys.argv[1])} if len(sys.argv) > 1 else {}
runs = {}
for name in SCHEDULERS:
    asked = load_scenario({"scheduler": name, **limit}, file)
    (setup,) = asked.setups()
    runs[name] = summarize(simulate(asked.load_trace(), setup), asked.slo_s)

print(
    "| scheduler | output tokens/s | requests/s within their SLO | TTFT p50 | TTFT p99 | Jain's index in contention |"
)
print("|---|---:|---:|---:|---:|---:|")
for name, run in runs.items():
    ttft, index = run["ttft_s"], run["fairness"]["contended_jain_index"]
    rates = f"{run['output_tokens_per_s']:,.0f} | {run['goodput_rps']:.2f}"
    waits = f"{format_s(ttft['p50'])} | {format_s(ttft['p99'])}"
    print(f"| {name} | {rates} | {waits} | {'-' if index is None else f'{index:.2f}'} |")

print()
print("| client | requests |" + "".join(f" {name}: TTFT p50, p99, within SLO |" for name in runs))
print("|---|---:|" + "---:|" * len(runs))
tenants = runs["fcfs"]["tenants"]
for client in sorted(tenants, key=lambda client: -tenants[client]["requests"]["submitted"])[:SHOWN]:
    cells = [client, f"{tenants[client]['requests']['submitted']:,}"]
    for run in runs.values():
        own = run["tenants"][client]
        good = own["goodput_rps"] * run["makespan_s"] / own["requests"]["submitted"]
        cells.append(f"{format_s(own['ttft_s']['p50'])}, {format_s(own['ttft_s']['p99'])}, {good:.0%}")
    print(f"| {' | '.join(cells)} |")
