"""What `kvsim simulate` and `kvsim compare` print: a report of one run, a table of several, progress."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from kvsim.cli.output import Columns, print_facts, print_json, print_line, print_table
from kvsim.text.printable import printable
from kvsim.text.units import format_bytes, format_count, format_s

if TYPE_CHECKING:
    from kvsim.report.runs import Run
    from kvsim.results.summary import Result
    from kvsim.run.parallel import Show

MISSING = "-"
SETTING_UP = "setting up"
TENANTS_SHOWN = 20
STATISTICS = ("mean", "p50", "p90", "p99", "max")
COMPARED = (
    "finished",
    "rejected",
    "timed out",
    "tokens/s",
    "vs first",
    "TTFT p50",
    "TTFT p99",
    "TPOT p50",
    "TPOT p99",
    "HBM peak",
    "DDR peak",
    "PCIe",
    "cached",
    "swaps",
    "preempted",
)


def print_run(result: "Result", slo_s: Mapping[str, float], warmup_s: float, *, json: bool) -> None:
    """Print one simulation: its summary as JSON, or its main figures."""
    from kvsim.report.runs import LATENCIES, runs_of

    (run,) = runs_of([result], slo_s, warmup_s)
    if json:
        print_json(run.summary)
        return
    inputs = run.summary["inputs"]
    ranks = f"tp {inputs['tp']}" + (f" x pp {inputs['pp']}" if inputs["pp"] > 1 else "")
    gpus = f"{inputs['gpus']} x {inputs['gpu']} ({inputs['parameter_set']}, {ranks}, host {inputs['host']})"
    print_facts(f"{run.label}: {inputs['model']} on {gpus}", _facts(run, slo_s))
    typer.echo()
    columns: Columns = {"latency": "left", **dict.fromkeys(STATISTICS, "right")}
    rows = ([name, *(_time(run.summary[key][x]) for x in STATISTICS)] for key, name in LATENCIES.items())
    print_table(columns, rows)
    if run.summary["uncertainty"]:
        _print_uncertainty(run)
    if len(run.summary["tenants"]) > 1:
        _print_tenants(run.summary)
    for note in [*inputs["trace_notes"], *inputs.get("model_notes", ()), *calibration_notes(inputs)]:
        print_line(f"note: {note}")
    for warning in run.summary["warnings"]:
        print_line(f"warning: {warning}")


def calibration_notes(inputs: Mapping[str, Any]) -> list[str]:
    """What is known of the constants that a run had from records; nothing where it had none."""
    return [inputs["calibration"]["words"]] if "calibration" in inputs else []


def _print_uncertainty(run: "Run") -> None:
    typer.echo()
    columns: Columns = {f"{run.label}, 95 % intervals": "left", **dict.fromkeys(("mean", "from", "to"), "right")}
    rows = list(run.intervals())
    if rows:
        print_table(columns, ([name, *map(show, interval)] for name, show, interval in rows))
    print_line(run.summary["uncertainty"]["method"])


def _print_tenants(summary: Mapping[str, Any]) -> None:
    tenants = sorted(summary["tenants"].items(), key=lambda item: -item[1]["requests"]["submitted"])
    latencies = [(key, rank) for key in ("ttft_s", "tpot_s") for rank in ("p50", "p99")]
    late = ["timed out"] if summary["requests"]["timed_out"] else []
    headings = ["SLO class", "finished", "rejected", *late, "goodput/s", "service/weight"]
    headings += [f"{key.removesuffix('_s').upper()} {rank}" for key, rank in latencies]
    columns: Columns = {"tenant": "left", **dict.fromkeys(headings, "right")}
    rows = (
        [
            name,
            own["slo_class"] or MISSING,
            f"{own['requests']['finished']:,}",
            f"{own['requests']['rejected']:,}",
            *(f"{own['requests']['timed_out']:,}" for _ in late),
            _rate(own["goodput_rps"]),
            format_count(round(own["weighted_service"])),
            *(_time(own[key][rank]) for key, rank in latencies),
        ]
        for name, own in tenants[:TENANTS_SHOWN]
    )
    typer.echo()
    print_table(columns, rows)
    if len(tenants) > TENANTS_SHOWN:
        print_line(f"and {len(tenants) - TENANTS_SHOWN:,} tenants with fewer requests")
    whole, contended = (MISSING if index is None else f"{index:.3f}" for index in summary["fairness"].values())
    print_line(f"Jain's index of service / weight: {whole}, while tenants contend {contended}")


def print_comparison(
    results: Sequence["Result"], slo_s: Mapping[str, float], warmup_s: float, missing: Sequence[str], *, json: bool
) -> None:
    """Print simulations side by side: their summaries as JSON, or one row for each; `missing` had not begun."""
    from kvsim.report.runs import runs_of
    from kvsim.results.files import comparison

    runs = runs_of(results, slo_s, warmup_s)
    if json:
        print_json(comparison([run.summary for run in runs], missing))
        return
    seldom = {"timed out": _timed_out, "preempted": _preempted}
    shown = [name for name in COMPARED if name not in seldom or any(map(seldom[name], runs))]
    columns: Columns = {"policy": "left", **dict.fromkeys(shown, "right"), "bottleneck": "left"}
    print_table(columns, (_cells(run, runs[0], shown) for run in runs))
    for run in runs:
        if run.summary["uncertainty"]:
            _print_uncertainty(run)
    for note in calibration_notes(runs[0].summary["inputs"]):
        print_line(f"note: {note}")
    for run in runs:
        for warning in run.summary["warnings"]:
            print_line(f"warning: {run.label}: {warning}")


def _facts(run: "Run", slo_s: Mapping[str, float]) -> dict[str, str]:
    summary = run.summary
    requests, tokens = summary["requests"], summary["tokens"]
    bounds = ", ".join(f"{name.removesuffix('_s')} <= {format_s(bound_s)}" for name, bound_s in slo_s.items())
    facts = {
        "trace": f"{summary['inputs']['trace']}, {requests['submitted']:,} requests",
        "requests": f"{requests['finished']:,} finished, {requests['rejected']:,} rejected"
        + (f", {requests['timed_out']:,} timed out" if requests["timed_out"] else ""),
        "tokens": f"{format_count(tokens['prompt'])} of prompts ({_cached(run)} cached), "
        f"{format_count(tokens['output'])} of output",
        "makespan": format_s(summary["makespan_s"]),
        "throughput": f"{_rate(summary['output_tokens_per_s'])} output tokens/s",
        "goodput": f"{_rate(summary['goodput_rps'])} requests/s" + (f" with {bounds}" if bounds else ""),
    }
    if room := summary["inputs"].get("kv_capacity"):
        held = "" if room["tokens"] is None else f" or {room['tokens']:,} tokens of the dense cache"
        facts["KV capacity"] = f"{format_bytes(room['bytes'])}{held} a replica: {room['source']}"
    for tier in run.tiers():
        peak, capacity = (run.tier_bytes(tier, figure) or 0.0 for figure in ("peak_bytes", "capacity_bytes"))
        facts[f"{tier.upper()} peak"] = f"{format_bytes(peak)} of {format_bytes(capacity)}, all together"
    for link, figures in summary["links"].items():
        if figures["bytes"]:
            facts[link] = f"{format_bytes(figures['bytes'])}, busy {figures['utilization']:.1%} of the time"
    for tier, lookups in summary["cache"].items():
        if lookups["lookup_blocks"]:
            hits = lookups["hit_blocks"] / lookups["lookup_blocks"]
            facts[f"{tier.upper()} cache"] = f"{hits:.1%} of {lookups['lookup_blocks']:,} blocks looked up were there"
    turns = {name: count for name, count in summary["session_kv"].items() if count}
    if turns:
        facts["session KV"] = ", ".join(f"{count:,} {name}" for name, count in turns.items())
    preempted = summary["preemptions"]
    if preempted["count"]:
        facts["preemptions"] = (
            f"{preempted['count']:,}: {preempted['by_swap']:,} by swap, {preempted['by_recomputation']:,} by "
            f"recomputation of {preempted['recomputed_tokens']:,} tokens"
        )
    if summary["swaps"]["count"]:
        facts["swaps"] = f"{summary['swaps']['count']:,}, {format_bytes(summary['swaps']['bytes'])}"
    if guessed := summary.get("speculation"):
        held = f", draft of {format_bytes(guessed['draft_weight_bytes'])}" if guessed["draft_weight_bytes"] else ""
        facts["speculation"] = f"{guessed['emitted_per_step']:.3g} tokens a step{held}"
    facts["bottleneck"] = run.bottleneck()
    facts["simulated in"] = f"{format_s(summary['cpu_s'])} of CPU time, after {format_s(summary['setup_cpu_s'])}"
    return facts


def _cells(run: "Run", first: "Run", shown: Sequence[str]) -> list[str]:
    summary = run.summary
    figures = [
        f"{summary['requests']['finished']:,}",
        f"{summary['requests']['rejected']:,}",
        f"{_timed_out(run):,}",
        _rate(summary["output_tokens_per_s"]),
        _ratio(summary["output_tokens_per_s"], first.summary["output_tokens_per_s"]),
        *(_time(summary[name][x]) for name in ("ttft_s", "tpot_s") for x in ("p50", "p99")),
        *(format_bytes(run.tier_bytes(tier, "peak_bytes") or 0.0) for tier in ("hbm", "ddr")),
        format_bytes(run.pcie_bytes()),
        _cached(run),
        f"{summary['swaps']['count']:,}",
        f"{_preempted(run):,}",
    ]
    own = dict(zip(COMPARED, figures, strict=True))
    return [run.label, *(own[name] for name in shown), summary["bottleneck"] or MISSING]


def _timed_out(run: "Run") -> int:
    return int(run.summary["requests"]["timed_out"])


def _preempted(run: "Run") -> int:
    return int(run.summary["preemptions"]["count"])


def _cached(run: "Run") -> str:
    tokens = run.summary["tokens"]
    return f"{tokens['prompt_cached'] / tokens['prompt']:.1%}" if tokens["prompt"] else MISSING


def _time(duration_s: float | None) -> str:
    return MISSING if duration_s is None else format_s(duration_s)


def _rate(rate: float | None) -> str:
    return MISSING if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _ratio(rate: float | None, first: float | None) -> str:
    return f"{rate / first:.2f}x" if rate and first else MISSING


@contextmanager
def progress_bars(labels: Sequence[str], requests: int) -> Iterator["Show"]:
    """A function that shows how many requests have left each run; it shows nothing unless stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _left: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    look = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*look, console=Console(stderr=True), transient=True) as bars:
        tasks = [bars.add_task(f"{escape(printable(label))}: {SETTING_UP}", total=requests) for label in labels]

        def show(left: Sequence[int]) -> None:
            for task, label, gone in zip(tasks, labels, left, strict=True):
                if gone:
                    bars.update(task, description=escape(printable(label)), completed=gone)

        yield show
