"""Run the three worked examples as users do, keep what they print as figures, and write their page.

    python benchmarks/worked_examples.py [--out benchmarks/results/worked_examples.json] [--pages]

`--pages` writes `docs/measured/worked_examples.md` from the result that is kept.
"""

import argparse
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import traces
from kvsim.text.units import format_s

ROOT = Path(__file__).parents[1]
CODING = "plan --scenario examples/coding_agents.yaml --slo ttft_p90=10s,tpot_p90=50ms --no-pools"
LONG = "compare --scenario examples/long_context.yaml"
POOLS = f"{LONG} --tp 4 --prefill-gpus 4"
MINUTES = 5.0
PLAN = ("policy", "gpu", "gpus", "tp", "options", "usd_per_hour", "cost_per_million_tokens", "binding", "slo", "fewer")
PAGE = """# Three services, sized

Written by `benchmarks/worked_examples.py` from `benchmarks/results/worked_examples.json`:
{machine}, commit {commit}. Wall times are those of a machine with other work on it.

## A fleet for coding agents

```
kvsim {coding_command}
```

`examples/coding_agents.yaml` replays the first {coding_limit} requests of the agentic-coding trace, whose sessions grow
by what tools answer: each prompt is nearly all of the one before. An agent waits for its answer (`sessions: closed`).
Asked are TTFT p90 within 10 s and TPOT p90 within 50 ms on H100s.

> {coding_sentence}

| plan | GPUs | USD/hour | USD/M tokens | TTFT p90 | TPOT p90 | one replica fewer breaks |
|---|---:|---:|---:|---:|---:|---|
{coding_rows}

{coding_decision}

## A chat service with two SLO classes

```
python examples/chat_two_classes.py
```

The first {minutes:g} minutes of Azure's conversations (`chat`: TTFT p99 within 1 s, TPOT p99 within 40 ms) and of
Mooncake's (`documents`: 20 s and 80 ms) on one fleet of Llama-3.1-8B on H100s, planned under a queue for all and under
priorities. A class is the `slo_class` of a tenant; `--slo chat:ttft_p99=1s` bounds it.

| scheduler | GPUs | USD/hour | chat TTFT p99 | TPOT p99 | documents TTFT p99 | TPOT p99 | one replica fewer breaks |
|---|---:|---:|---:|---:|---:|---:|---|
{chat_rows}

{chat_decision}

## A million tokens on one host

```
kvsim {long_command}
kvsim {pools_command}
```

Prompts of 600,000 to a million tokens, one in 100 s, with answers of 1,000, on eight H200s of one host: all eight for
every request (tp 8), then four for prompts and four for decoding. Goodput counts TTFT within 3 min and TPOT within
100 ms.

| split | policy | goodput/s | tokens/s | TTFT p50 | TTFT p99 | TPOT p50 | TPOT p99 | HBM peak | DDR peak |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|
{long_rows}

{long_decision}
"""


def kvsim(command: str) -> tuple[int, dict[str, Any], float]:
    """The exit code of a command, the document that it prints, and the wall time that it took."""
    began_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "kvsim", *command.split(), "--json"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if not done.stdout:
        raise SystemExit(done.stderr)
    return done.returncode, json.loads(done.stdout), time.perf_counter() - began_s


def measured(limit: int | None = None, minutes: float = MINUTES) -> dict[str, Any]:
    """What the three come to, on the first requests alone where `limit` says so."""
    short = f" --limit {limit}" if limit else ""
    _, plan, coding_s = kvsim(CODING + short)
    chat = runpy.run_path(str(ROOT / "examples" / "chat_two_classes.py"))
    began_s, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "two-classes.jsonl"
        traces.write(chat["merged"](minutes), file)
        rows = [{"scheduler": name, **_kept(chat["planned"](file, name))} for name in ("fcfs", "priority")]
    chat_s, long_s, runs = time.perf_counter() - began_s, 0.0, []
    for command in (LONG, POOLS):
        _, found, wall_s = kvsim(command + short)
        long_s += wall_s
        runs += [_run(one) for one in found["runs"]]
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "coding": {
            "sentence": plan["sentence"],
            "plans": [_kept(row) for row in plan["plans"] if row.get("slo")],
            "wall_s": coding_s,
        },
        "chat": {"minutes": minutes, "plans": rows, "wall_s": chat_s},
        "long": {"runs": runs, "wall_s": long_s},
    }


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in PLAN}


def _run(run: dict[str, Any]) -> dict[str, Any]:
    tiers = {
        tier: [one["peak_bytes"] for name, one in run["memory"].items() if name.endswith(tier)]
        for tier in ("hbm", "ddr")
    }
    return {
        "policy": run["inputs"]["policy"],
        "prefill_gpus": run["inputs"]["prefill_gpus"],
        "finished": run["requests"]["finished"],
        "goodput_rps": run["goodput_rps"],
        "output_tokens_per_s": run["output_tokens_per_s"],
        **{f"{name}_{p}": run[name][p] for name in ("ttft_s", "tpot_s") for p in ("p50", "p99")},
        **{f"{tier}_peak_bytes": sum(values) for tier, values in tiers.items()},
    }


def page(result: dict[str, Any]) -> str:
    """The page of a result."""
    coding, chat, long = result["coding"], result["chat"], result["long"]
    return PAGE.format(
        machine=result["machine"],
        commit=result["commit"],
        coding_command=CODING,
        coding_limit=_limit(),
        coding_sentence=coding["sentence"],
        coding_rows="\n".join(_plan_row(_name(row), row, ("ttft_p90", "tpot_p90")) for row in coding["plans"]),
        coding_decision=_decided(_coding(coding["plans"]), coding["wall_s"]),
        minutes=chat["minutes"],
        chat_rows="\n".join(
            _plan_row(row["scheduler"], {**row, "cost_per_million_tokens": None}, CHAT) for row in chat["plans"]
        ),
        chat_decision=_decided(_chat(chat["plans"]), chat["wall_s"]),
        long_command=LONG,
        pools_command=POOLS,
        long_rows="\n".join(_run_row(run) for run in long["runs"]),
        long_decision=_decided(_long(long["runs"]), long["wall_s"]),
    )


CHAT = ("chat:ttft_p99", "chat:tpot_p99", "documents:ttft_p99", "documents:tpot_p99")


def _decided(words: str, wall_s: float) -> str:
    return textwrap.fill(f"**Decided:** {words} All of it took {format_s(wall_s)}.", 116, break_on_hyphens=False)


def _limit() -> str:
    text = (ROOT / "examples" / "coding_agents.yaml").read_text(encoding="utf-8")
    return next(line.removeprefix("limit: ") for line in text.splitlines() if line.startswith("limit: "))


def _name(row: dict[str, Any]) -> str:
    return f"{row['policy']}, {' '.join(row['options'])}" if row["options"] else row["policy"]


def _plan_row(name: str, row: dict[str, Any], bounds: tuple[str, ...]) -> str:
    cost = [] if row["cost_per_million_tokens"] is None else [f"{row['cost_per_million_tokens']:.2f}"]
    values = [format_s(row["slo"][bound]["value_s"]) for bound in bounds]
    cells = [name, str(row["gpus"]), f"{row['usd_per_hour']:.2f}", *cost, *values, row["binding"] or "-"]
    return f"| {' | '.join(cells)} |"


def _run_row(run: dict[str, Any]) -> str:
    split = "4 + 4" if run["prefill_gpus"] else "8"
    times = [format_s(run[f"{name}_{p}"]) for name in ("ttft_s", "tpot_s") for p in ("p50", "p99")]
    peaks = [f"{run[f'{tier}_peak_bytes'] / 2**30:,.0f} GiB" for tier in ("hbm", "ddr")]
    rates = [f"{run['goodput_rps']:.4f}", f"{run['output_tokens_per_s']:.1f}"]
    return f"| {' | '.join([split, run['policy'], *rates, *times, *peaks])} |"


def _coding(plans: list[dict[str, Any]]) -> str:
    """Whether the cache is worth it, by the two cheapest of both kinds."""
    cached = next((row for row in plans if row["options"]), None)
    plain = next((row for row in plans if not row["options"]), None)
    if cached is None or plain is None:
        return f"{plans[0]['gpus']} GPUs."
    if cached["gpus"] >= plain["gpus"]:
        return f"no prefix cache: with it {cached['gpus']} GPUs are needed, without it {plain['gpus']}."
    return (
        f"prefixes are kept in DDR behind a router that looks for them: {cached['gpus']} GPUs hold the SLO so, and "
        f"{plain['gpus']} are needed without, since what an agent sends again need not be computed again."
    )


def _chat(plans: list[dict[str, Any]]) -> str:
    fcfs, priority = (row["gpus"] for row in plans)
    if priority < fcfs:
        return (
            f"priorities. {priority} GPUs hold both classes where {fcfs} are needed in order of arrival, since a "
            "chat's prompt no longer waits behind documents, which have the time."
        )
    return f"the plain queue: priorities save nothing here ({priority} GPUs, and {fcfs} in order of arrival)."


def _long(runs: list[dict[str, Any]]) -> str:
    best = max(runs, key=lambda run: (run["goodput_rps"], -run["ttft_s_p99"], -run["tpot_s_p50"]))
    worst = min(runs, key=lambda run: run["goodput_rps"])
    split = (
        "four GPUs for prompts and four for decoding" if best["prefill_gpus"] else "all eight GPUs for every request"
    )
    return (
        f"{split}, under `{best['policy']}`, with the best goodput and, of equals, the best latencies; "
        f"`{worst['policy']}` serves least. A prompt of this length is arithmetic for most of a minute, which no "
        "policy of this table takes away. What each of them loses in quality is another question: "
        "[quality.md](../quality.md)."
    )


def main() -> None:
    """Measure, or read what was kept, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "worked_examples.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "measured" / "worked_examples.md")
    parser.add_argument("--pages", action="store_true", help="write the page only")
    given = parser.parse_args()
    if not given.pages:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        result = {"schema_version": 1, "commit": commit, **measured()}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    given.page.write_text(page(json.loads(given.out.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
