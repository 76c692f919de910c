"""Plan an hour of chat on three kinds of GPU under four ways to keep KV, and check the answer by plain simulations.

The answer's fleet is played on the recorded trace, with one replica fewer, and on five traces whose arrivals are spread
over the ticks that the trace records; then the load that the same fleet sustains is sought with and without a prefix
cache in DDR. `docs/measured/planning.md` is written from the result.

    python benchmarks/planning.py [--out benchmarks/results/planning.json] [--page docs/measured/planning.md]
"""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import traces
from kvsim import Setup, default_host, load_gpu, load_host, load_model, plan, simulate, summarize
from kvsim.text.units import format_s
from policies import parse_policy

ROOT = Path(__file__).parents[1]
TRACE, SPREAD, SEEDS, MODEL = "mooncake-conversation", "mooncake-conversation:spread_s=3", 5, "llama-3.1-70b"
GPUS, POLICIES = ("a100-80g-sxm", "h100-sxm", "h200-sxm"), ("full", "retroinfer", "shadowkv")
SLO = {"ttft_s": 30.0, "tpot_s": 0.1}
WRITTEN = "ttft_p99=30s,tpot_p99=100ms"
NAMES = {"ttft_p99": "ttft_s", "tpot_p99": "tpot_s"}
KEPT = (
    *("policy", "gpu", "gpus", "replicas", "tp", "pp", "prefill_gpus", "options", "feasible", "binding", "slo"),
    *("quality", "usd_per_hour", "pareto", "fewer", "cost_per_million_tokens", "kwh_per_million_tokens"),
    *("cached_share", "bottleneck", "reason"),
)
PAGE = """# A plan, checked

Written by `benchmarks/planning.py` from `benchmarks/results/planning.json`:
{machine}, commit {commit}, load average {load:g} before.

`kvsim plan` on the Mooncake conversation trace (12,031 requests of an hour) with Llama-3.1-70B, TTFT p99 within 30 s
and TPOT p99 within 100 ms:

> {sentence}

{simulations} simulations took {cpu:.0f} CPU seconds, all of it {wall} of wall time on that machine, with machine code
that an earlier plan had kept (`start.md`); the first estimate was there after {first}, and said {estimate} GPUs. Asked
for arrivals that are drawn with {seeds} seeds (`mooncake-conversation:spread_s=3`), it says:

> {drawn_sentence}

That took {drawn_simulations} simulations, {drawn_cpu:.0f} CPU seconds and {drawn_wall}. Each plan below is the cheapest
of its GPU, policy and cache; 95 % intervals are by resampling the trace's requests.

| plan | GPU | GPUs | tp | for prompts | USD/hour | USD/M tokens | TTFT p99 | TPOT p99 | one replica fewer breaks |
|---|---|---:|---:|---:|---:|---:|---:|---:|---|
{rows}

## If things turn out otherwise

The answer's fleet, simulated once more under each change; a price is an exact product.

| change | SLO | TTFT p99 | TPOT p99 | USD/M tokens | GPUs that hold | USD/M tokens then |
|---|---|---:|---:|---:|---:|---:|
{changes}

## Checked by plain simulations

Figures of `kvsim simulate` with the answer's options. The trace records arrivals in ticks of three seconds;
`spread_s=3` spreads them over the tick, by a seed.

| fleet | trace | TTFT p99 | TPOT p99 | SLO |
|---|---|---:|---:|---|
{checks}

## What DDR is worth

The load that {gpus} x {gpu} sustain within the SLO, as a multiple of the recorded rate, in the best of
the splits that the plan tries.

| prefix cache | for prompts | cached of all prompt tokens | sustained | breaks at | breaks |
|---|---:|---:|---:|---:|---|
{worth}

An infinite cache of one host for all hits 36.6 % of this trace's blocks (`kvsim trace info mooncake-conversation`).
Mooncake (FAST 2025) states that 1 TB of DDR holds some 3 million tokens of a 70B model and that 50 million come near
the most that can be hit; a host here has 1 TiB of its DDR for prefixes, and requests go to where their prefix is.
"""


def git(*words: str) -> str:
    """What git says."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def setup_of(row: dict[str, Any], gpus: int, prefill_gpus: int) -> Setup:
    """A plan's fleet, with as many GPUs."""
    gpu = load_gpu(row["gpu"])
    cached: dict[str, Any] = {"prefix_cache_ddr_bytes": 1 << 40, "router": "kv-aware"} if row["options"] else {}
    if row["options"] not in ([], ["--prefix-cache-ddr", "1TiB", "--router", "kv-aware"]):
        raise ValueError(f"options {row['options']} are none that this script plays again")
    return Setup(
        model=load_model(MODEL),
        policy=parse_policy(row["policy"]),
        gpu=gpu,
        host=load_host(default_host(gpu.name)),
        gpus=gpus,
        tp=row["tp"],
        pp=row["pp"],
        prefill_gpus=prefill_gpus,
        **cached,
    )


def check(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The answer's fleet and the next smaller one, on the recorded trace and on five drawn ones."""
    whole = setup_of(answer, answer["gpus"], answer["prefill_gpus"])
    recorded = traces.load(TRACE)
    played = [("the answer", "recorded", whole, recorded)]
    for fewer in {
        answer["fewer"]["prefill_gpus"],
        max(0, answer["prefill_gpus"] - answer["tp"]),
        answer["prefill_gpus"],
    }:
        if fewer < answer["fewer"]["gpus"]:
            smaller = setup_of(answer, answer["fewer"]["gpus"], fewer)
            played.append(("one replica fewer", "recorded", smaller, recorded))
    played += [("the answer", f"spread, seed {i}", whole, traces.load(SPREAD, seed=i)) for i in range(SEEDS)]
    rows = []
    for name, trace, fleet, requests in played:
        summary = summarize(simulate(requests, fleet))
        values = {latency: summary[latency]["p99"] for latency in SLO}
        rows.append(
            {
                "fleet": name,
                "gpus": fleet.gpus,
                "prefill_gpus": fleet.prefill_gpus,
                "trace": trace,
                **values,
                "holds": all(values[latency] <= limit_s for latency, limit_s in SLO.items()),
            }
        )
    return rows


def worth(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The load that as many GPUs sustain without and with a prefix cache in DDR."""
    rows = []
    ways: dict[str, dict[str, Any]] = {
        "none": {"prefix_cache_ddr": 0},
        "1 TiB of each host's DDR": {"prefix_cache_ddr": 1 << 40, "router": "kv-aware"},
    }
    for name, options in ways.items():
        found = plan(
            trace=TRACE, model=MODEL, gpu=answer["gpu"], policy="full", slo=WRITTEN, gpus=answer["gpus"], **options
        )
        best = found.answer or found.nearest
        if best is None:
            raise ValueError(f"{answer['gpus']} x {answer['gpu']} serve nothing with prefix cache {name}")
        rows.append({"cache": name, **{key: best.get(key) for key in (*KEPT, "load")}})
    return rows


def page(result: dict[str, Any]) -> str:
    """The page of a result."""
    found = result["plan"]
    answer = found["answer"]
    rows = [_plan_row(row) for row in found["plans"] if row["gpus"] is not None]
    checks = [
        f"| {row['fleet']}: {row['gpus']} GPUs, {row['prefill_gpus']} for prompts | {row['trace']} | "
        f"{format_s(row['ttft_s'])} | {format_s(row['tpot_s'])} | {'holds' if row['holds'] else 'breaks'} |"
        for row in result["checks"]
    ]
    loads = [
        f"| {row['cache']} | {row['prefill_gpus']} | {row['cached_share']:.1%} | {_times(row['load']['holds_at'])} | "
        f"{_times(row['load']['breaks_at'])} | {row['load']['breaks'] or '-'} |"
        for row in result["worth"]
    ]
    return PAGE.format(
        machine=result["machine"],
        commit=result["commit"],
        load=result["load_average"],
        sentence=found["sentence"],
        simulations=found["simulations"],
        cpu=found["simulations_cpu_s"],
        wall=format_s(found["wall_s"]),
        first=format_s(found["first_answer"]["wall_s"]),
        estimate=found["first_answer"]["gpus"],
        rows="\n".join(rows),
        checks="\n".join(checks),
        changes="\n".join(_change_row(row) for row in found["sensitivity"]),
        seeds=SEEDS,
        drawn_sentence=result["drawn"]["sentence"],
        drawn_simulations=result["drawn"]["simulations"],
        drawn_cpu=result["drawn"]["simulations_cpu_s"],
        drawn_wall=format_s(result["drawn"]["wall_s"]),
        gpus=answer["gpus"],
        gpu=answer["gpu"],
        worth="\n".join(loads),
    )


def _plan_row(row: dict[str, Any]) -> str:
    name = row["policy"] + (", prefix cache in DDR" if row["options"] else "")
    cost = row["cost_per_million_tokens"]
    cells = [
        name if row["feasible"] else f"{name} (does not hold)",
        row["gpu"],
        f"{row['gpus']}",
        f"{row['tp']}",
        f"{row['prefill_gpus']}",
        f"{row['usd_per_hour']:,.2f}",
        "-" if cost is None else f"{cost:,.2f}",
        *(_value(row["slo"].get(one)) for one in NAMES),
        row["fewer"]["binding"] if row["fewer"] else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _change_row(row: dict[str, Any]) -> str:
    needed = row["needed"] or {"gpus": None, "cost_per_million_tokens": None}
    values_s = [row["slo"].get(one) for one in NAMES]
    costs = [row["cost_per_million_tokens"], needed["cost_per_million_tokens"]]
    told = ["-" if cost is None else f"{cost:,.2f}" for cost in costs]
    cells = [
        row["change"],
        {True: "holds", False: "breaks", None: row["method"]}[row["holds"]],
        *("-" if value_s is None else format_s(value_s) for value_s in values_s),
        told[0],
        "-" if needed["gpus"] is None else f"{needed['gpus']}",
        told[1],
    ]
    return f"| {' | '.join(cells)} |"


def _value(bound: dict[str, Any] | None) -> str:
    if bound is None or bound["value_s"] is None:
        return "-"
    ends = "" if bound["low_s"] is None else f" ({format_s(bound['low_s'])} to {format_s(bound['high_s'])})"
    return format_s(bound["value_s"]) + ends


def _times(scale: float | None) -> str:
    return "-" if scale is None else f"{scale:.2f}x"


def main() -> None:
    """Plan and check, or write the page of what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "planning.json")
    parser.add_argument("--page", type=Path, help="only write this page, from what --out holds")
    given = parser.parse_args()
    if given.page:
        given.page.write_text(page(json.loads(given.out.read_text())))
        return
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    result: dict[str, Any] = {
        "machine": machine,
        "commit": git("rev-parse", "--short", "HEAD"),
        "load_average": round(os.getloadavg()[0], 1),
    }
    warm = plan(trace=TRACE, model=MODEL, gpu=GPUS, policy=POLICIES, slo=WRITTEN).to_dict()  # code is kept from here on
    found = plan(trace=TRACE, model=MODEL, gpu=GPUS, policy=POLICIES, slo=WRITTEN).to_dict()
    answer = found["answer"]
    if answer is None:
        raise SystemExit(found["sentence"])
    drawn = plan(trace=SPREAD, model=MODEL, gpu=GPUS, policy=POLICIES, slo=WRITTEN, seeds=SEEDS).to_dict()
    figures = ("sentence", "simulations", "simulations_cpu_s", "wall_s", "first_answer")
    result["drawn"] = {name: drawn[name] for name in figures}
    result["before"] = {name: warm[name] for name in figures}
    result["plan"] = {
        **{name: found[name] for name in (*figures, "sensitivity")},
        "answer": {name: answer.get(name) for name in (*KEPT, "headroom", "load", "simulate")},
        "plans": [{name: row.get(name) for name in KEPT} for row in found["plans"]],
    }
    result["checks"] = check(answer)
    result["worth"] = worth(answer)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
