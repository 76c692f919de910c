"""The charts about runs: latencies and what they were spent on, memories, links; and the legends of their parts."""

from collections.abc import Sequence
from typing import Any

from kvsim.report.page import Chart, Page
from kvsim.report.plots import COLOURS, cdf, occupancy, stacked_bytes, stacked_shares, total_over_replicas
from kvsim.report.runs import Run
from kvsim.results.causes import CAUSES
from kvsim.results.summary import Floats, finished, latencies
from kvsim.text.units import format_bytes

_CAUSES = ("plans", "weights", "swaps", "prefix", "collectives", "handoff")  # first, so that their colours stay


def cdf_chart(page: Page, runs: Sequence[Run], name: str, warmup_s: float) -> Chart:
    """How many requests had a latency, `ttft_s` or `tpot_s`, within which time."""
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


def spent_charts(page: Page, runs: Sequence[Run]) -> list[Chart]:
    """What latencies were spent on, up to the first token and from there on."""
    charts = []
    for phase, title in (("ttft", "Time to first token"), ("decode", "From the first token to the last")):
        shares = {run.label: run.summary["attribution"][phase]["mean_share"] for run in runs}
        bars = {label: causes for label, causes in shares.items() if causes["queue"] is not None}
        caption = "Mean over the finished requests of the share of each cause."
        charts.append(page.chart(title, caption, stacked_shares(bars, CAUSES)))
    return charts


def occupancy_chart(page: Page, runs: Sequence[Run], tier: str) -> Chart:
    """Bytes in `hbm` or `ddr` over time."""
    curves = {run.label: total_over_replicas(run.result.series, f"{tier}_bytes") for run in runs}
    capacities = [run.tier_bytes(tier, "capacity_bytes") or 0.0 for run in runs]
    caption = f"Sum over all replicas; capacity {' or '.join(map(format_bytes, dict.fromkeys(capacities)))}."
    return page.chart(f"{tier.upper()} in use", caption, occupancy(curves, max(capacities)))


def places_chart(page: Page, runs: Sequence[Run]) -> dict[str, Any]:
    """The chart of what each tier holds at its peak, and its legend."""
    tiers = list(dict.fromkeys(tier for run in runs for tier in run.tiers()))
    bars = {run.label: {tier: run.tier_bytes(tier, "peak_bytes") or 0.0 for tier in tiers} for run in runs}
    caption = "Each tier at its own peak, summed over its memories."
    chart = page.chart("Bytes at the peak", caption, stacked_bytes(bars, tiers))
    return {"tiers": coloured(tiers), "peaks": [chart]}


def traffic_charts(page: Page, runs: Sequence[Run]) -> dict[str, Any]:
    """A chart of the bytes by cause for each kind of link, and their legend."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.link_kinds()))
    bars = {kind: {run.label: run.cause_bytes(run.link_kinds().get(kind, ())) for run in runs} for kind in kinds}
    moved = [cause for of_runs in bars.values() for causes in of_runs.values() for cause in causes]
    causes = list(dict.fromkeys((*_CAUSES, *moved)))
    caption = "Bytes over the whole run, by cause."
    charts = [page.chart(kind, caption, stacked_bytes(bars[kind], causes)) for kind in kinds]
    return {"traffic_causes": coloured(causes), "traffic": charts}


def coloured(parts: Sequence[str]) -> list[tuple[str, str]]:
    """The legend of stacked bars: each part, and its colour as a CSS border."""
    return [(part, f"solid {COLOURS[index % len(COLOURS)]}") for index, part in enumerate(parts)]
