"""The step fidelity against the op fidelity over a random design of clusters: how far times are apart, and where.

Every case draws a policy, a host, GPUs, ranks, a trace, open or closed sessions, prefix tiers and memory from `--seed`;
models have eight layers, requests are 50 to 150. With `--pipelines` it draws two or four stages instead, for policies
that use each link of a host or none. `docs/measured/fidelities.md` is written from both results.

    python benchmarks/fidelities.py [--cases 100] [--seed 0] [--first 0] [--pipelines] [--processes 2]
    python benchmarks/fidelities.py --page docs/measured/fidelities.md
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import policies
import traces
from kvsim import Setup, load_gpu, load_host, load_model, simulate, summarize
from policies import parse_policy

ROOT = Path(__file__).parents[1]
RESULT, PIPED_RESULT = (ROOT / "benchmarks" / "results" / f"fidelities{of}.json" for of in ("", "_pipelines"))
POLICIES = tuple(f"{name}:tier=ddr" if name == "squeezed-attention" else name for name in sorted(policies.POLICIES))
HOSTS = ("ddr4-dual-xeon", "ddr5-dual-xeon", "desktop-i9-10900x")
TRACES = ("azure-2023-code", "azure-2023-conv", "mooncake-conversation", "agentic-coding")
CACHED = "full, prefixes in DDR"
PIPED_POLICIES = ("full", "offload-all", "shadowkv", "retrieval-attention", "quest", CACHED)
PIPED = 1  # of the seed
LAYERS, MOST_OUTPUTS, MOST_PROMPT = 8, 32, 16_000
FIGURES = ("throughput", "ttft mean", "tpot mean", "e2e mean", "ttft p50", "tpot p50", "ttft p99", "tpot p99")
MEANS = FIGURES[:4]  # within 2 %; the others within 5


def piped_case(seed: int, number: int) -> tuple[traces.Trace, Setup, dict[str, Any]]:
    """The same for pipelines."""
    rng = np.random.default_rng((seed, PIPED, number))
    policy = PIPED_POLICIES[number % len(PIPED_POLICIES)]
    tiered = policy == CACHED
    host = load_host(str(rng.choice(HOSTS)))
    sizes = [(pp, tp) for pp in (2, 4) for tp in (1, 2) if pp * tp <= host.gpus_max]
    pp, tp = sizes[int(rng.integers(len(sizes)))]
    most = host.gpus_max // (pp * tp)
    gpus = pp * tp * int(rng.choice([n for n in (1, 2, 2, 4) if n <= most]))
    name = "mooncake-conversation" if tiered else str(rng.choice(TRACES[:3]))
    n = int(rng.integers(50, 101))
    model = load_model("llama-3.1-8b")
    model = replace(model, name="eight-layers", layers=model.layers[:LAYERS])
    setup = Setup(
        policy=parse_policy("full" if tiered else policy),
        model=model,
        gpu=load_gpu("h100-sxm"),
        host=host,
        gpus=gpus,
        tp=tp,
        pp=pp,
        max_num_batched_tokens=int(rng.choice([512, 2048, 8192])),
        prefix_cache_ddr_bytes=64 << 30 if tiered else 0,
    )
    trace = _clipped(traces.load(name, limit=n), tiered)
    load = float(rng.uniform(0.3, 0.9))
    trace = _paced(trace, setup, load)
    drawn = {"policy": policy, "host": host.name, "gpus": gpus, "tp": tp, "pp": pp, "trace": name, "requests": n}
    return trace, setup, drawn | {"tiers": tiered, "load": round(load, 2)}


def case(seed: int, number: int) -> tuple[traces.Trace, Setup, dict[str, Any]]:
    """The case of a number: its trace, its setup, and what was drawn."""
    rng = np.random.default_rng((seed, number))
    policy = POLICIES[number % len(POLICIES)]
    host = load_host(str(rng.choice(HOSTS)))
    gpus = int(rng.choice([n for n in (1, 2, 4, 8) if n <= host.gpus_max]))
    tp = int(rng.choice([n for n in (1, 1, 2, 4) if n <= gpus]))
    name = str(rng.choice(TRACES))
    n = int(rng.integers(50, 151))
    model = load_model("llama-3.1-8b")
    model = replace(model, name="eight-layers", layers=model.layers[:LAYERS])
    options: dict[str, Any] = {"max_num_batched_tokens": int(rng.choice([512, 2048, 8192]))}
    closed = name == "agentic-coding" and rng.random() < 0.5
    if closed:
        options["sessions"] = "closed"
    trace = traces.load(name, limit=n)
    tiered = len(trace.block_ids) > 0 and policy in ("full", "offload-all", "quest") and rng.random() < 0.5
    if tiered:
        options["prefix_cache_ddr_bytes"] = 64 << 30
        options["prefix_cache_hbm_bytes"] = int(rng.choice([0, 4 << 30])) * gpus
    tight = rng.random() < 0.3
    setup = Setup(policy=parse_policy(policy), model=model, gpu=load_gpu("h100-sxm"), host=host, gpus=gpus, tp=tp)
    setup = replace(setup, **options)
    trace = _clipped(trace, tiered)
    if tight:
        setup = _tight(setup, trace)
    load = float(rng.uniform(0.3, 0.9))
    if not closed:
        trace = _paced(trace, setup, load)
    drawn = {
        "policy": policy,
        "host": host.name,
        "gpus": gpus,
        "tp": tp,
        "trace": name,
        "requests": n,
        "closed": closed,
    }
    return trace, setup, drawn | {"tiers": tiered, "tight": tight, "load": round(load, 2)}


def _clipped(trace: traces.Trace, tiered: bool) -> traces.Trace:
    """Outputs, and where no prefix is cached prompts, no longer than op can be asked for."""
    outputs = np.minimum(trace.output_tokens, MOST_OUTPUTS)
    if tiered:
        return replace(trace, output_tokens=outputs)
    none = np.zeros(0, trace.block_ids.dtype), np.zeros_like(trace.block_offsets)
    prompts = np.minimum(trace.prompt_tokens, MOST_PROMPT)
    fields = {"block_tokens": 0, "block_ids": none[0], "block_offsets": none[1]}
    return replace(trace, output_tokens=outputs, prompt_tokens=prompts, **fields)


def _paced(trace: traces.Trace, setup: Setup, load: float) -> traces.Trace:
    """Arrivals stretched or squeezed so that the cluster works so large a share of the time, as step sees it."""
    at_once = replace(trace, arrival_s=np.zeros(len(trace)))
    span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    if span_s == 0:
        return trace
    busy_s = simulate(at_once, replace(setup, sessions="open")).makespan_s
    return trace.scaled_rate(span_s / (busy_s / load))


def _tight(setup: Setup, trace: traces.Trace) -> Setup:
    """The same with memory for the three largest requests on each replica, so that sequences are swapped."""
    token_bytes = sum(2 * layer.kv_heads * layer.head_dim * 2 for layer in setup.rank.layers)
    largest = int((trace.prompt_tokens + trace.output_tokens).max())
    taken = setup.rank.weight_bytes + setup.reserve_bytes[0] + setup.prefix_cache_hbm_bytes // setup.gpus
    gpu = replace(setup.gpu, memory_bytes=taken + 3 * largest * token_bytes)
    return replace(setup, gpu=gpu, gpu_memory_utilization=1.0)


def compare(given: tuple[int, int], pipelines: bool = False) -> dict[str, Any]:
    """A case in both fidelities."""
    trace, setup, drawn = (piped_case if pipelines else case)(*given)
    found, took = {}, {}
    for fidelity in ("step", "op"):
        began_s = time.process_time()
        found[fidelity] = figures(summarize(simulate(trace, replace(setup, fidelity=fidelity))))
        took[f"{fidelity}_cpu_s"] = round(time.process_time() - began_s, 2)
    return {"number": given[1], **drawn, **took, **found}


def figures(summary: dict[str, Any]) -> dict[str, float | None]:
    """What is compared."""
    found = {"throughput": summary["output_tokens_per_s"]}
    for name in ("ttft", "tpot", "e2e"):
        for of in ("mean", "p50", "p99"):
            found[f"{name} {of}"] = summary[f"{name}_s"][of]
    return {name: found[name] for name in FIGURES}


def errors(row: dict[str, Any]) -> dict[str, float]:
    """How far step is from op, relative to op; figures that neither has are left out."""
    return {
        name: row["step"][name] / row["op"][name] - 1
        for name in FIGURES
        if row["op"][name] and row["step"][name] is not None
    }


def summary_rows(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float, float, float, float]]:
    """Of each figure: the mean signed error, and of its size the median, the 95th percentile and the worst."""
    for name in FIGURES:
        found = np.array([errors(row)[name] for row in rows if name in errors(row)])
        size = np.abs(found)
        yield name, float(found.mean()), *(float(np.quantile(size, q)) for q in (0.5, 0.95, 1.0))


def is_within(row: dict[str, Any], means: float, others: float) -> bool:
    """Whether all figures of a case are: throughput and means within one bound, medians and p99 within another."""
    return all(abs(error) <= (means if name in MEANS else others) for name, error in errors(row).items())


PAGE = """# The step fidelity against the op fidelity

Written by `benchmarks/fidelities.py` from `benchmarks/results/fidelities.json` (commit {commit}, seed {seed}).

The step fidelity prices an iteration at once, with the mean of what its neighbours on the host leave it; in the op
fidelity every operation is an event and every link is shared max-min fairly at every moment. Here both replay {cases}
random cases: {policies} policies, 1 to 8 H100s on three hosts, 1 to 4 ranks, four traces of 50 to 150 requests, open
and closed sessions, prefix tiers and tight memory, a load of 0.3 to 0.9; eight layers of Llama-3.1-8B. In {shared} of
them replicas share a host.

| step against op | mean error | median size | 95th percentile | worst |
|---|---:|---:|---:|---:|
{rows}

Throughput and means are within 2 %, and medians and p99 within 5 %, in {within} of {cases} cases, and within 3 and 7 %
in {worst}. What is left is correlation: neighbours that began the same work at the same moment stay in step and meet
each other more often than chance has it, and a single late iteration moves a median of few requests. Where that
matters, use `--fidelity op`.

| case | policy | host | GPUs | ranks | trace | load | tokens/s | TTFT | TPOT | TTFT p50 | TPOT p50 | TPOT p99 |
|---:|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|
{worst_rows}

## Pipelines

From `benchmarks/results/fidelities_pipelines.json` (commit {piped_commit}, seed {piped_seed}): {piped_cases} cases of
two or four stages of one or two ranks, one to four pipelines on a host, 50 to 100 requests. In {piped_shared} of them
pipelines share a host. Policies: {piped_policies}.

| step against op | mean error | median size | 95th percentile | worst |
|---|---:|---:|---:|---:|
{piped_rows}

Throughput and means are within 2 %, and medians and p99 within 5 %, in {piped_within} of {piped_cases} cases, and
within 3 and 7 % in {piped_worst}. Which stages of one pipeline are at work together the step fidelity reads off the
times of their micro-batches. What it does not follow is how copies that hold each other up on one switch
(`offload-all`) come to coincide: there it is too fast. Use `--fidelity op` where that matters.

| case | policy | host | GPUs | tp | pp | trace | load | tokens/s | TTFT | TPOT | TTFT p50 | TPOT p50 | TPOT p99 |
|---:|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|
{piped_worst_rows}
"""


def page(result: dict[str, Any]) -> str:
    """The result for people, and what is kept of pipelines."""
    piped = json.loads(PIPED_RESULT.read_text())
    found = {**_figures(result), **{f"piped_{name}": value for name, value in _figures(piped).items()}}
    found["piped_policies"] = ", ".join(f"`{name}`" if name != CACHED else name for name in PIPED_POLICIES)
    return PAGE.format(**found)


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["rows"]
    lines = [f"| {name} | " + " | ".join(f"{x:.1%}" for x in values) + " |" for name, *values in summary_rows(rows)]
    far = [row for row in rows if not is_within(row, 0.02, 0.05)]
    shown = ("throughput", "ttft mean", "tpot mean", "ttft p50", "tpot p50", "tpot p99")
    drawn = [key for key in ("number", "policy", "host", "gpus", "tp", "pp", "trace", "load") if key in rows[0]]
    worst = [
        "| " + " | ".join(str(row[key]) for key in drawn)
        + " | " + " | ".join(f"{errors(row).get(name, 0.0):+.1%}" for name in shown) + " |"
        for row in far
    ]  # fmt: skip
    return {
        **{key: result[key] for key in ("commit", "seed")},
        "cases": len(rows),
        "policies": len({row["policy"] for row in rows}),
        "shared": sum(row["gpus"] > row["tp"] * row.get("pp", 1) for row in rows),
        "rows": "\n".join(lines),
        "within": len(rows) - len(far),
        "worst": sum(is_within(row, 0.03, 0.07) for row in rows),
        "worst_rows": "\n".join(worst),
    }


def main() -> None:
    """Run the cases and write what came of them, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--pipelines", action="store_true")
    parser.add_argument("--page", type=Path, help="only write this page, from what --out holds")
    given = parser.parse_args()
    if given.page:
        given.page.write_text(page(json.loads(RESULT.read_text())))
        return
    out = PIPED_RESULT if given.pipelines else RESULT
    numbers = range(given.first, given.first + given.cases)
    rows = []
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    with ProcessPoolExecutor(given.processes) as executor:
        for row in executor.map(partial(compare, pipelines=given.pipelines), [(given.seed, n) for n in numbers]):
            rows.append(row)
            worst = max(errors(row).items(), key=lambda item: abs(item[1]), default=("", 0.0))
            said = [row.get(key) for key in ("number", "policy", "host", "gpus", "tp", "pp", "op_cpu_s")]
            sys.stderr.write(" ".join(map(str, [*said, *worst])) + "\n")
            result = {"commit": commit, "seed": given.seed, "rows": rows}
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
