"""The tables of the report page: figures of each run's summary, side by side."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kvsim.report.page import MISSING, Cell, Table, name_cell, number_cell, table, text_cell
from kvsim.report.runs import Run, format_rate
from kvsim.results.causes import CAUSES
from kvsim.results.intervals import CONFIDENCE
from kvsim.scenario.scenario_file import OPTIONS
from kvsim.text.units import format_bytes, format_count, format_s

_TENANTS_SHOWN = 50  # of each run


class Column(NamedTuple):
    """A column of figures; `best` picks the one to mark, where one end of the scale is better."""

    heading: str
    value: Callable[[Run], float | None]
    show: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = None


def _index(value: float) -> str:
    return f"{value:.3f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


COMPARED = (
    Column("finished", lambda run: run.summary["requests"]["finished"], format_count),
    Column("rejected", lambda run: run.summary["requests"]["rejected"], format_count),
    Column("timed out", lambda run: run.summary["requests"]["timed_out"], format_count),
    Column("output tokens/s", lambda run: run.summary["output_tokens_per_s"], format_rate, max),
    Column("goodput req/s", lambda run: run.summary["goodput_rps"], format_rate, max),
    Column("TTFT p50", lambda run: run.summary["ttft_s"]["p50"], format_s, min),
    Column("TTFT p99", lambda run: run.summary["ttft_s"]["p99"], format_s, min),
    Column("TPOT p50", lambda run: run.summary["tpot_s"]["p50"], format_s, min),
    Column("TPOT p99", lambda run: run.summary["tpot_s"]["p99"], format_s, min),
    Column("queue p99", lambda run: run.summary["queue_s"]["p99"], format_s, min),
    Column("HBM peak", lambda run: run.tier_bytes("hbm", "peak_bytes"), format_bytes),
    Column("DDR peak", lambda run: run.tier_bytes("ddr", "peak_bytes"), format_bytes),
    Column("PCIe bytes", Run.pcie_bytes, format_bytes),
    Column("cached prompt", lambda run: _ratio(run.summary["tokens"], "prompt_cached", "prompt"), _share),
    Column("preemptions", lambda run: int(run.result.requests["preemptions"].sum()), format_count),
)


def comparison(runs: Sequence[Run]) -> Table:
    """The main table: one row per run, the best of each column bold when there are several."""
    columns = [_cells(column, runs) for column in COMPARED]
    rows = [
        [run.name_cell, *(cells[index] for cells in columns), text_cell(run.summary["bottleneck"] or MISSING)]
        for index, run in enumerate(runs)
    ]
    caption = "Memory peaks and PCIe bytes are sums over all GPUs and hosts"
    caption += "; the best of a column is bold." if len(runs) > 1 else "."
    return table(caption, ["policy", *(column.heading for column in COMPARED), "bottleneck"], rows, ["bottleneck"])


def busy(runs: Sequence[Run]) -> Table:
    """How much of the time each resource worked."""

    def busiest(run: Run) -> str | None:
        return max(run.summary["busy"], key=run.summary["busy"].__getitem__, default=None)

    resources = list(dict.fromkeys(name for run in runs for name in run.summary["busy"]))
    rows = [
        [
            run.name_cell,
            *(number_cell(run.summary["busy"].get(name), _share, name == busiest(run)) for name in resources),
        ]
        for run in runs
    ]
    caption = "Share of the makespan in which each resource was busy, mean over replicas; the busiest is bold."
    return table(caption, ["policy", *resources], rows)


def spent(runs: Sequence[Run]) -> Table:
    """How long a request waited for what, in the mean, and the mean latency that this adds up to."""
    rows = []
    for run in runs:
        mean_s = run.summary["attribution"]["e2e"]["mean_s"]
        cells = [number_cell(mean_s[name], format_s, name == run.summary["bottleneck"]) for name in CAUSES]
        rows.append([run.name_cell, *cells, number_cell(run.summary["e2e_s"]["mean"], format_s)])
    caption = "Mean time of a finished request by cause; the bottleneck, once it is admitted, is bold."
    return table(caption, ["policy", *CAUSES, "end to end"], rows)


def intervals(runs: Sequence[Run]) -> Table | None:
    """Means and confidence intervals, where they were asked for; None where none is known."""
    rows = [
        [run.name_cell, text_cell(name), *(number_cell(value, show) for value in interval)]
        for run in runs
        for name, show, interval in run.intervals()
    ]
    caption = f"Means and {CONFIDENCE:.0%} confidence intervals."
    return table(caption, ["policy", "figure", "mean", "from", "to"], rows, ["figure"]) if rows else None


def places(runs: Sequence[Run]) -> Table:
    """What each tier holds at its peak, of how much."""
    tiers = list(dict.fromkeys(tier for run in runs for tier in run.tiers()))
    rows = []
    for run in runs:
        sizes = [(run.tier_bytes(tier, "peak_bytes"), run.tier_bytes(tier, "capacity_bytes")) for tier in tiers]
        rows.append([run.name_cell, *(number_cell(size, format_bytes) for pair in sizes for size in pair)])
    headings = [f"{tier.upper()} {figure}" for tier in tiers for figure in ("peak", "capacity")]
    return table("Bytes held in each tier when it was fullest.", ["policy", *headings], rows)


def cache(runs: Sequence[Run]) -> Table | None:
    """What the prefix caches were asked for and had; None where none was asked."""
    rows = [
        [
            run.name_cell,
            text_cell(tier),
            *(number_cell(blocks[name], format_count) for name in ("lookup_blocks", "hit_blocks")),
            number_cell(_ratio(blocks, "hit_blocks", "lookup_blocks"), _share),
        ]
        for run in runs
        for tier, blocks in run.summary["cache"].items()
        if blocks["lookup_blocks"]
    ]
    caption = "Prefix cache: blocks looked up in each tier, and found there."
    return table(caption, ["policy", "tier", "lookups", "hits", "hit ratio"], rows, ["tier"]) if rows else None


def links(runs: Sequence[Run]) -> Table:
    """Bytes and utilization of each kind of link."""
    rows = []
    for run in runs:
        for kind, names in run.link_kinds().items():
            figures = [run.summary["links"][name] for name in names]
            shares = [link["utilization"] for link in figures]
            moved = number_cell(sum(link["bytes"] for link in figures), format_bytes)
            rows.append(
                [
                    run.name_cell,
                    text_cell(kind),
                    number_cell(len(names), format_count),
                    moved,
                    number_cell(sum(shares) / len(shares), _share),
                    number_cell(max(shares), _share),
                ]
            )
    caption = "Links that moved bytes, those of one kind together: * stands for the number of a GPU or switch."
    return table(caption, ["policy", "link", "links", "bytes", "mean utilization", "highest"], rows, ["link"])


def tenants(runs: Sequence[Run]) -> Table:
    """Each tenant's requests, rates and latencies in each run, those with most requests first."""
    rows = []
    for run in runs:
        ordered = sorted(run.summary["tenants"].items(), key=lambda item: -item[1]["requests"]["submitted"])
        for name, own in ordered[:_TENANTS_SHOWN]:
            latencies = [own[figure][rank] for figure in ("ttft_s", "tpot_s", "queue_s") for rank in ("p50", "p99")]
            rows.append(
                [
                    run.name_cell,
                    text_cell(name),
                    text_cell(own["slo_class"] or MISSING),
                    *(number_cell(count, format_count) for count in own["requests"].values()),
                    number_cell(own["output_tokens_per_s"], format_rate),
                    number_cell(own["goodput_rps"], format_rate),
                    number_cell(round(own["weighted_service"]), format_count),
                    *(number_cell(latency_s, format_s) for latency_s in latencies),
                ]
            )
    most = max(len(run.summary["tenants"]) for run in runs)
    caption = (
        f"The {_TENANTS_SHOWN} tenants with most requests of {most:,}." if most > _TENANTS_SHOWN else "All tenants."
    )
    caption += " Service is prompt tokens computed and output tokens, each at its weight."
    headings = ["policy", "tenant", "SLO class", "submitted", "finished", "rejected", "timed out", "output tokens/s"]
    headings += ["goodput req/s", "service / weight"]
    headings += [f"{figure} {rank}" for figure in ("TTFT", "TPOT", "queue") for rank in ("p50", "p99")]
    return table(caption, headings, rows, ["tenant", "SLO class"])


def fairness(runs: Sequence[Run]) -> Table:
    """How evenly the tenants of each run were served."""
    rows = [
        [run.name_cell, *(number_cell(index, _index) for index in run.summary["fairness"].values())] for run in runs
    ]
    caption = "Jain's index of service / weight: 1 is even, 1 / tenants is all to one."
    return table(caption, ["policy", "whole run", "while tenants contend"], rows)


def inputs(runs: Sequence[Run]) -> list[Table]:
    """Every resolved input: those that all runs share, then a column for each run where they differ."""
    given = [dict(_flat(run.summary["inputs"])) for run in runs]
    keys = list(dict.fromkeys(key for values in given for key in values))
    same = [key for key in keys if all(values.get(key) == given[0].get(key) for values in given)]
    shared = [[_input_cell(key), text_cell(given[0][key])] for key in same]
    differing = [
        [_input_cell(key), *(text_cell(values.get(key, MISSING)) for values in given)]
        for key in keys
        if key not in same
    ]
    caption = "Inputs that all runs share." if differing else "Inputs."
    tables = [table(caption, ["input", "value"], shared, ["value"])]
    if differing:
        labels = [run.label for run in runs]
        tables.append(table("Inputs that differ.", ["input", *labels], differing, labels))
    return tables


_ABOUT = {one.recorded or one.name: f"{one.flag}: {one.help}" for one in OPTIONS}


def _input_cell(key: str) -> Cell:
    """The name of an input, with the flag that gives it and what that does."""
    return name_cell(key, about=_ABOUT.get(key.partition(".")[0], ""))


def _cells(column: Column, runs: Sequence[Run]) -> list[Cell]:
    values = [column.value(run) for run in runs]
    known = [value for value in values if value is not None]
    best = column.best(known) if column.best and len(set(known)) > 1 else None
    return [number_cell(value, column.show, value is not None and value == best) for value in values]


def _ratio(counts: Mapping[str, int], part: str, whole: str) -> float | None:
    return counts[part] / counts[whole] if counts[whole] else None


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of all values in nested mappings."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else key)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)
