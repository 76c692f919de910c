"""What becomes of a session's KV between its turns, on a recorded trace of coding agents: one row for each choice.

In closed loop, Llama-3.1-8B on one, four and eight H100s; means over seeds, which draw when sessions start.
"""

from statistics import fmean
from typing import Any

from benchmarks.docs_tables.markdown import holding, paragraph, share, table
from benchmarks.docs_tables.runs import summary, written_by
from kvsim import SESSION_KVS

BASE = {"trace": "agentic-coding", "model": "llama-3.1-8b", "gpu": "h100-sxm", "sessions": "closed"}
REQUESTS, SEEDS, GPUS = 1000, 8, (1, 4, 8)


def measure(limit: int | None) -> dict[str, Any]:
    """Every choice on every number of GPUs, figures of each seed."""
    rows = []
    for gpus in GPUS:
        for choice in SESSION_KVS:
            options = {**BASE, "session_kv": choice, "gpus": gpus, "router": "least-loaded", "limit": REQUESTS}
            seeds = range(SEEDS if limit is None else 1)
            figures = [_figures(summary({**options, "seed": seed}, limit)) for seed in seeds]
            rows.append({"gpus": gpus, "session_kv": choice, **{k: [f[k] for f in figures] for k in figures[0]}})
    return {"requests": limit or REQUESTS, "rows": rows}


def _figures(run: dict[str, Any]) -> dict[str, float]:
    return {
        "ttft_mean_s": run["ttft_s"]["mean"],
        "ttft_p50_s": run["ttft_s"]["p50"],
        "e2e_mean_s": run["e2e_s"]["mean"],
        "cached_share": run["tokens"]["prompt_cached"] / run["tokens"]["prompt"],
        "resumed": run["session_kv"]["resumed"],
        "swapped_bytes": run["swaps"]["bytes"],
    }


def page(result: dict[str, Any]) -> str:
    """The table, and how far `cheapest` is from the best fixed choice."""
    means = [{k: fmean(v) if isinstance(v, list) else v for k, v in row.items()} for row in result["rows"]]
    rows = [
        [
            str(row["gpus"]),
            row["session_kv"],
            *(f"{row[name]:.2f}" for name in ("ttft_mean_s", "ttft_p50_s", "e2e_mean_s")),
            f"{row['cached_share']:.1%}",
            f"{row['resumed']:.0f}",
            f"{row['swapped_bytes'] / 1e12:.1f}",
        ]
        for row in means
    ]
    of = {(row["gpus"], row["session_kv"]): row for row in means}
    fixed = [choice for choice in SESSION_KVS if choice != "cheapest"]

    def behind(name: str) -> float:
        return max(of[n, "cheapest"][name] / min(of[n, x][name] for x in fixed) - 1 for n in GPUS)

    least = min(of[n, "cheapest"]["swapped_bytes"] / of[n, "swap"]["swapped_bytes"] for n in GPUS)
    seeds = [row["ttft_mean_s"] for row in result["rows"] if row["gpus"] == GPUS[-1]]
    apart = max(max(of_seeds) / min(of_seeds) - 1 for of_seeds in seeds)
    heads = ("H100s", "session_kv", "TTFT mean, s", "p50", "e2e mean, s", "tokens cached", "resumed", "swapped, TB")
    return (
        "# Between the turns of coding agents\n\n"
        + paragraph(
            written_by("session_kv", result),
            f"{result['requests']:,} requests of the agentic-coding trace in closed loop, Llama-3.1-8B under `full`, "
            f"`--router least-loaded`, means over {len(seeds[0])} seeds, which draw when sessions start. What the "
            "choices mean: `docs/session_kv.md`.",
        )
        + "\n"
        + table(heads, rows, left=2)
        + "\n"
        + paragraph(
            f"`cheapest` has the mean latency of the best fixed choice within {share(max(0, behind('e2e_mean_s')))} "
            f"and its mean TTFT within {share(max(0, behind('ttft_mean_s')))}.",
            *holding(
                (least < 0.95, f"It swaps down to {share(least)} of the bytes that `swap` does."),
                (
                    apart > 0.1,
                    (
                        "Means over eight GPUs are noisy: a long prompt holds up the sessions that happen to be on "
                        f"its replica, and single seeds of one choice differ by up to {share(apart)}."
                    ),
                ),
            ),
        )
    )
