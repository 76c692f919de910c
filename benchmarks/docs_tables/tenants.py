"""The clients of ServeGen's reasoning service under each scheduler: what `examples/compare_schedulers.py` prints."""

from typing import Any

from benchmarks.docs_tables.markdown import holding, paragraph, share, table
from benchmarks.docs_tables.runs import ROOT, summary, written_by
from kvsim import SCHEDULERS, format_s

SCENARIO = ROOT / "examples" / "tenants.yaml"
SHOWN = 8


def measure(limit: int | None) -> dict[str, Any]:
    """Each scheduler's run: the whole service, its largest clients, and who contended most."""
    rows = []
    for name in SCHEDULERS:
        run = summary({"scheduler": name}, limit, SCENARIO)
        tenants = run["tenants"]
        largest = sorted(tenants, key=lambda client: -tenants[client]["requests"]["submitted"])[:SHOWN]
        contended = sorted(tenants, key=lambda client: -tenants[client]["contended_s"])[:2]
        rows.append(
            {
                "scheduler": name,
                "clients": len(tenants),
                "requests": run["requests"]["submitted"],
                "makespan_s": run["makespan_s"],
                "output_tokens_per_s": run["output_tokens_per_s"],
                "goodput_rps": run["goodput_rps"],
                **{f"ttft_{p}_s": run["ttft_s"][p] for p in ("p50", "p99")},
                "contended_jain_index": run["fairness"]["contended_jain_index"],
                "largest": {client: _client(tenants[client], run["makespan_s"]) for client in largest},
                "contend_most": {
                    client: {key: tenants[client][key] for key in ("contended_s", "contended_service")}
                    for client in contended
                },
            }
        )
    return {"rows": rows}


def _client(own: dict[str, Any], makespan_s: float) -> dict[str, Any]:
    submitted = own["requests"]["submitted"]
    return {
        "requests": submitted,
        **{f"ttft_{p}_s": own["ttft_s"][p] for p in ("p50", "p99")},
        "within_slo": own["goodput_rps"] * makespan_s / submitted,
    }


def page(result: dict[str, Any]) -> str:
    """Schedulers beside each other, then clients, then what can be read off both."""
    rows = result["rows"]
    of = {row["scheduler"]: row for row in rows}
    first, fair, priority = rows[0], of["fair"], of["priority"]
    largest = list(first["largest"])
    rates = [row["output_tokens_per_s"] for row in rows]
    served = [
        one["contended_service"] / one["contended_s"] for one in fair["contend_most"].values() if one["contended_s"]
    ]
    apart = max(served) / min(served) - 1 if served else 0.0
    passed_s = priority["largest"][largest[0]]["ttft_p50_s"]
    heads = ("scheduler", "output tokens/s", "requests/s within SLO", "TTFT p50", "TTFT p99", "Jain's index, contended")
    summary_rows = [
        [
            row["scheduler"],
            f"{row['output_tokens_per_s']:,.0f}",
            f"{row['goodput_rps']:.2f}",
            *(format_s(row[f"ttft_{p}_s"]) for p in ("p50", "p99")),
            "-" if row["contended_jain_index"] is None else f"{row['contended_jain_index']:.2f}",
        ]
        for row in rows
    ]
    client_rows = [
        [client, f"{first['largest'][client]['requests']:,}", *(_waits(row["largest"][client]) for row in rows)]
        for client in largest
    ]
    return (
        "# ServeGen's clients under three schedulers\n\n"
        + paragraph(
            written_by("tenants", result),
            f"The busiest hour of ServeGen's reasoning service: {first['requests']:,} requests of {first['clients']} "
            f"clients, {share(first['largest'][largest[0]]['requests'] / first['requests'])} of them of one. "
            "`examples/tenants.yaml` serves them on four H100s with Llama-3.1-8B, gives the largest client a class of "
            "its own at a lower priority, and asks of all others for a TTFT of 2 s and a TPOT of 60 ms; "
            "`python examples/compare_schedulers.py` prints the same tables. What schedulers do: `docs/tenants.md`.",
        )
        + "\n"
        + table(heads, summary_rows)
        + "\n"
        + table(
            ("client", "requests", *(f"{row['scheduler']}: TTFT p50, p99, within SLO" for row in rows)), client_rows
        )
        + "\n"
        + paragraph(
            *holding(
                (
                    max(rates) < 1.03 * min(rates),
                    (
                        f"Schedulers serve the same number of tokens, within {share(max(rates) / min(rates) - 1)}; "
                        "who waits differs."
                    ),
                ),
                (
                    first["ttft_p50_s"] > 10 and fair["ttft_p50_s"] < first["ttft_p50_s"],
                    "With `fcfs` the clients share one queue, and all wait.",
                ),
                (
                    passed_s > 2 * first["largest"][largest[0]]["ttft_p50_s"],
                    (
                        "`priority` lets the others pass before the largest client, whose median TTFT is "
                        f"{format_s(passed_s)}."
                    ),
                ),
                (
                    fair["ttft_p50_s"] < first["ttft_p50_s"],
                    "With `fair` a client waits for what it asks beyond its share; those that ask for less wait less.",
                ),
                (
                    len(served) == 2 and apart < 0.05,
                    (
                        "The two that contend most "
                        f"({' and '.join(f'`{client}`' for client in fair['contend_most'])}) are served at the same "
                        f"rate to {share(apart)} (`contended_service` / `contended_s`)."
                    ),
                ),
                (
                    fair["goodput_rps"] > max(row["goodput_rps"] for row in rows if row is not fair),
                    "More requests are within their SLO than under either of the others.",
                ),
            ),
        )
    )


def _waits(own: dict[str, Any]) -> str:
    return f"{format_s(own['ttft_p50_s'])}, {format_s(own['ttft_p99_s'])}, {own['within_slo']:.0%}"
