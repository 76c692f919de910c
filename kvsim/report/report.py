"""The report page of a simulation or a comparison: what came out, how the policies differ, and what was assumed."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvsim.report import tables
from kvsim.report.page import Chart, Page
from kvsim.report.plots import COLOURS, cdf, occupancy, stacked_bytes, stacked_shares, total_over_replicas
from kvsim.report.runs import Run, runs_of
from kvsim.results.causes import CAUSES
from kvsim.results.summary import Floats, Result, finished, latencies
from kvsim.text.units import format_bytes, format_s

_CAUSES = ("plans", "weights", "swaps", "prefix", "collectives", "handoff")  # first, so that their colours stay
_FACTS = ("Trace", "Requests", "Model", "GPU", "GPUs", "TP", "Host")
_TITLED = 3  # more policies than this are counted in the title, not named


def report_html(
    results: Sequence[Result],
    *,
    slo: Mapping[str, float] | None = None,
    warmup_s: float = 0.0,
    identity: Mapping[str, str] | None = None,
    missing: Sequence[str] = (),
) -> str:
    """A self-contained HTML page about one or more results, with the statistics of `summarize`.

    `identity` is that of the files beside it, and `missing` the policies that an interruption left no time. Raises
    ValueError as `summarize` does, and when there are no results.
    """
    if not results:
        raise ValueError("there are 0 results to report; a report needs at least 1")
    runs = runs_of(results, slo, warmup_s)
    policies = " vs ".join(run.label for run in runs) if len(runs) <= _TITLED else f"{len(runs)} policies"
    page = Page()
    content = {
        "facts": {name: _named(runs, name.lower()) for name in _FACTS},
        "interrupted": _interrupted(runs, missing),
        "finding": _finding(runs),
        "warnings": [
            f"{run.label}: {text}" if len(runs) > 1 else text for run in runs for text in run.summary["warnings"]
        ],
        "runs": [(run.label, run.style.css_border) for run in runs],
        "compared": tables.comparison(runs),
        "busy": tables.busy(runs),
        "latency": [_cdf(page, runs, name, warmup_s) for name in ("ttft_s", "tpot_s")],
        "causes": _coloured(CAUSES),
        "spent_shares": _spent(page, runs),
        "spent": tables.spent(runs),
        "estimated": list(
            dict.fromkeys(run.summary["uncertainty"]["method"] for run in runs if run.summary["uncertainty"])
        ),
        "intervals": tables.intervals(runs),
        "memory": [_occupancy(page, runs, tier) for tier in ("hbm", "ddr")],
        **_places(page, runs),
        "places": tables.places(runs),
        "cache": tables.cache(runs),
        **_traffic(page, runs),
        "links": tables.links(runs),
        "tenants": tables.tenants(runs) if any(len(run.summary["tenants"]) > 1 for run in runs) else None,
        "fairness": tables.fairness(runs),
        "inputs": tables.inputs(runs),
        "notes": _notes(runs, slo or {}, warmup_s, identity or {}),
    }
    return page.html("simulation", f"{_named(runs, 'trace')}: {policies}", identity or {}, **content)


def _capacity(run: Run) -> str:
    """Room for KV in HBM, and where that figure is from."""
    room = run.summary["inputs"]["kv_capacity"]
    tokens = "" if room["tokens"] is None else f" or {room['tokens']:,} tokens of the dense cache"
    return f"KV capacity of a replica: {format_bytes(room['bytes'])}{tokens}; {room['source']}."


def _named(runs: Sequence[Run], key: str) -> str:
    """An input of all runs; several where they differ."""
    return ", ".join(dict.fromkeys(str(run.summary["inputs"].get(key, "not stated")) for run in runs))


def _interrupted(runs: Sequence[Run], missing: Sequence[str]) -> list[str]:
    """What an interruption left unfinished."""
    return [f"{run.label} is partial" for run in runs if run.result.partial] + [f"{x} had not begun" for x in missing]


def _finding(runs: Sequence[Run]) -> str:
    """The outcome in a sentence or two."""
    rated = [run for run in runs if run.summary["output_tokens_per_s"]]
    if not rated:
        return "No request finished."
    best, worst = (pick(rated, key=_tokens_per_s) for pick in (max, min))
    finding = f"{best.label} gives {_tokens_per_s(best):,.0f} output tokens/s"
    if _tokens_per_s(best) > _tokens_per_s(worst):
        finding += f", {_tokens_per_s(best) / _tokens_per_s(worst):.2f} times those of {worst.label}"
    waits = [(run.summary["ttft_s"]["p99"], run.label) for run in rated if run.summary["ttft_s"]["p99"] is not None]
    if waits:
        soonest_s, label = min(waits)
        whose = f"{label} has the lowest 99th percentile" if len(runs) > 1 else "The 99th percentile"
        finding += f". {whose} of time to first token{':' if len(runs) > 1 else ' is'} {format_s(soonest_s)}"
    return finding + "."


def _tokens_per_s(run: Run) -> float:
    return float(run.summary["output_tokens_per_s"])


def _cdf(page: Page, runs: Sequence[Run], name: str, warmup_s: float) -> Chart:
    samples: dict[str, Floats] = {}
    for run in runs:
        values = latencies(run.result)[name]
        measured = finished(run.result) & (run.result.requests["arrival_s"] >= warmup_s) & (values >= 0)
        samples[run.label] = values[measured]
    title, caption = {
        "ttft_s": ("Time to first token", "Further left is better; the upper end of a line is its slowest request."),
        "tpot_s": ("Time per output token", "Mean over a request's tokens after the first; further left is better."),
    }[name]
    return page.chart(title, caption, cdf(samples, title.lower()))


def _spent(page: Page, runs: Sequence[Run]) -> list[Chart]:
    charts = []
    for phase, title in (("ttft", "Time to first token"), ("decode", "From the first token to the last")):
        shares = {run.label: run.summary["attribution"][phase]["mean_share"] for run in runs}
        bars = {label: causes for label, causes in shares.items() if causes["queue"] is not None}
        caption = "Mean over the finished requests of the share of each cause."
        charts.append(page.chart(title, caption, stacked_shares(bars, CAUSES)))
    return charts


def _occupancy(page: Page, runs: Sequence[Run], tier: str) -> Chart:
    curves = {run.label: total_over_replicas(run.result.series, f"{tier}_bytes") for run in runs}
    capacities = [run.tier_bytes(tier, "capacity_bytes") or 0.0 for run in runs]
    caption = f"Sum over all replicas; capacity {' or '.join(map(format_bytes, dict.fromkeys(capacities)))}."
    return page.chart(f"{tier.upper()} in use", caption, occupancy(curves, max(capacities)))


def _places(page: Page, runs: Sequence[Run]) -> dict[str, Any]:
    """The chart of what each tier holds at its peak, and its legend."""
    tiers = list(dict.fromkeys(tier for run in runs for tier in run.tiers()))
    bars = {run.label: {tier: run.tier_bytes(tier, "peak_bytes") or 0.0 for tier in tiers} for run in runs}
    caption = "Each tier at its own peak, summed over its memories."
    chart = page.chart("Bytes at the peak", caption, stacked_bytes(bars, tiers))
    return {"tiers": _coloured(tiers), "peaks": [chart]}


def _traffic(page: Page, runs: Sequence[Run]) -> dict[str, Any]:
    """A chart of the bytes by cause for each kind of link, and their legend."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.link_kinds()))
    bars = {kind: {run.label: run.cause_bytes(run.link_kinds().get(kind, ())) for run in runs} for kind in kinds}
    moved = [cause for of_runs in bars.values() for causes in of_runs.values() for cause in causes]
    causes = list(dict.fromkeys((*_CAUSES, *moved)))
    caption = "Bytes over the whole run, by cause."
    charts = [page.chart(kind, caption, stacked_bytes(bars[kind], causes)) for kind in kinds]
    return {"traffic_causes": _coloured(causes), "traffic": charts}


def _coloured(parts: Sequence[str]) -> list[tuple[str, str]]:
    """The legend of stacked bars: each part, and its colour as a CSS border."""
    return [(part, f"solid {COLOURS[index % len(COLOURS)]}") for index, part in enumerate(parts)]


def _notes(runs: Sequence[Run], slo: Mapping[str, float], warmup_s: float, identity: Mapping[str, str]) -> list[str]:
    bounds = (
        " with " + ", ".join(f"{name} ≤ {bound_s:g}" for name, bound_s in slo.items()) if slo else "; no SLO is set"
    )
    notes = [
        "TTFT is the time from a request's arrival to its first token, queue the time from arrival to admission.",
        "TPOT is the mean time per output token after the first.",
        "Latency is spent in the queue, on a cached prefix, on swaps, and in the batch.",
        "In the batch it is arithmetic, HBM or launches while the SMs work, and otherwise what they wait for.",
        "Percentiles are nearest ranks over finished requests.",
        f"Goodput counts finished requests{bounds}.",
        "Memory and links show what the simulator charged; lines are thinned to what a screen shows, with their peaks.",
    ]
    if warmup_s:
        notes.append(f"Latencies leave out requests that arrived in the first {format_s(warmup_s)}.")
    notes += dict.fromkeys(f"Trace: {note}" for run in runs for note in run.summary["inputs"].get("trace_notes", ()))
    notes += dict.fromkeys(f"Model: {note}" for run in runs for note in run.summary["inputs"].get("model_notes", ()))
    notes += dict.fromkeys(_capacity(run) for run in runs if "kv_capacity" in run.summary["inputs"])
    for run in runs:
        counts = run.summary["requests"]
        note = f"{run.label}: {counts['finished']:,} of {counts['submitted']:,} requests finished, "
        note += f"{counts['rejected']:,} were rejected, {counts['timed_out']:,} timed out; "
        note += f"simulated {format_s(run.summary['makespan_s'])}."
        if len(runs) > 1 and identity:
            note += f" Its files bear the run id {run.summary['run_id']}."
        notes.append(note)
    if identity:
        notes.append(
            "The files of this page share " + ", ".join(f"{name} {own}" for name, own in identity.items()) + "."
        )
    return notes
