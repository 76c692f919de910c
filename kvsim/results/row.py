"""One run as one row of a table: the figures of its summary that compare runs, by names with dots."""

from collections.abc import Mapping
from typing import Any

Value = int | float | str | None

_WHOLE = ("requests", "tokens", "preemptions", "swaps", "session_kv", "busy")
_STATISTICS = ("mean", "p50", "p90", "p99", "max")
_LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s")
_FIGURES = ("output_tokens_per_s", "goodput_rps", "slo_attainment", "makespan_s", "bottleneck")


def figures(summary: Mapping[str, Any]) -> dict[str, Value]:
    """The row of a run, by what `summarize` gives; what it spent itself, and what is of single GPUs, is left out."""
    row: dict[str, Value] = {name: summary[name] for name in _FIGURES}
    for name in _LATENCIES:
        row |= {f"{name}.{of}": summary[name][of] for of in _STATISTICS}
    for name in _WHOLE:
        row |= {f"{name}.{key}": value for key, value in summary[name].items()}
    for memory, held in summary["memory"].items():
        tier = memory.rpartition(".")[2]
        for of in ("capacity_bytes", "peak_bytes"):
            row[f"{tier}.{of}"] = int(row.get(f"{tier}.{of}") or 0) + int(held[of])
    for link, moved in summary["links"].items():
        row |= {f"{link}.bytes": moved["bytes"], f"{link}.utilization": moved["utilization"]}
    for tier, hits in summary["cache"].items():
        row |= {f"cache.{tier}.{key}": value for key, value in hits.items()}
    row |= {f"share.{name}": value for name, value in summary["attribution"]["e2e"]["mean_share"].items()}
    row["warnings"] = "; ".join(summary["warnings"])
    return row
