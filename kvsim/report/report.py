"""The report page of a simulation or a comparison: what came out, how the policies differ, and what was assumed."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvsim.report import tables
from kvsim.report.page import Contents, Page, html_of
from kvsim.report.run_charts import cdf_chart, coloured, occupancy_chart, places_chart, spent_charts, traffic_charts
from kvsim.report.runs import Run, runs_of
from kvsim.results.causes import CAUSES
from kvsim.results.summary import Result
from kvsim.text.units import format_bytes, format_s

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
    """A self-contained HTML page about one or more results, as `report_contents`."""
    return html_of(report_contents(results, slo=slo, warmup_s=warmup_s, identity=identity, missing=missing))


def report_contents(
    results: Sequence[Result],
    *,
    slo: Mapping[str, float] | None = None,
    warmup_s: float = 0.0,
    identity: Mapping[str, str] | None = None,
    missing: Sequence[str] = (),
) -> Contents:
    """What a page says about one or more results, with the statistics of `summarize`.

    `identity` is that of the files beside it, and `missing` the policies that an interruption left no time. Raises
    ValueError as `summarize` does, and when there are no results.
    """
    if not results:
        raise ValueError("there are 0 results to report; a report needs at least 1")
    runs = runs_of(results, slo, warmup_s)
    policies = " vs ".join(run.label for run in runs) if len(runs) <= _TITLED else f"{len(runs)} policies"
    page = Page()
    content: dict[str, Any] = {
        "facts": {name: _named(runs, name.lower()) for name in _FACTS},
        "interrupted": _interrupted(runs, missing),
        "finding": _finding(runs),
        "warnings": [
            f"{run.label}: {text}" if len(runs) > 1 else text for run in runs for text in run.summary["warnings"]
        ],
        "runs": [(run.label, run.style.css_border) for run in runs],
        "compared": tables.comparison(runs),
        "busy": tables.busy(runs),
        "latency": [cdf_chart(page, runs, name, warmup_s) for name in ("ttft_s", "tpot_s")],
        "causes": coloured(CAUSES),
        "spent_shares": spent_charts(page, runs),
        "spent": tables.spent(runs),
        "estimated": list(
            dict.fromkeys(run.summary["uncertainty"]["method"] for run in runs if run.summary["uncertainty"])
        ),
        "intervals": tables.intervals(runs),
        "memory": [occupancy_chart(page, runs, tier) for tier in ("hbm", "ddr")],
        **places_chart(page, runs),
        "places": tables.places(runs),
        "cache": tables.cache(runs),
        **traffic_charts(page, runs),
        "links": tables.links(runs),
        "tenants": tables.tenants(runs) if any(len(run.summary["tenants"]) > 1 for run in runs) else None,
        "fairness": tables.fairness(runs),
        "inputs": tables.inputs(runs),
        "notes": _notes(runs, slo or {}, warmup_s, identity or {}),
    }
    title = f"{_named(runs, 'trace')}: {policies}"
    return page.contents("simulation", title, identity or {}, main=content["compared"], **content)


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
    fits = [run.summary["inputs"]["calibration"] for run in runs if "calibration" in run.summary["inputs"]]
    notes += dict.fromkeys(f"Calibration: {words}." for one in fits for words in (one["words"], *one["warnings"]))
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
