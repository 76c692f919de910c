"""What sparse prefills leave out of a prompt's attention, by their plans."""

from typing import Any

from benchmarks.docs_tables.markdown import paragraph, table
from benchmarks.docs_tables.runs import asked, written_by

CONTEXTS = ("8k", "32k", "128k")
BY_HAND = {
    "xattention": "choosing: n^2 d / S of 2 n^2 d, 1 / (2 S)",
    "hip": "(256 + 1,024 + 2,048) / (n / 2)",
    "lazyllm": "(1 + 0.75^2 + 0.5^2 + 0.3^2) / 4; tokens (1 + 0.75 + 0.5 + 0.3) / 4",
}
PUBLISHED_DENSITY, PUBLISHED_SPEEDUP = 0.069, 13.5  # XAttention at 128K, and at 256K


def measure(_limit: int | None) -> dict[str, Any]:
    """Shares of each policy and context, and XAttention's speed-up at the density that its authors report."""
    where = ("--model", "llama-3.1-8b", "--gpu", "h100-sxm")
    kept = ("attention_share", "choosing_share", "tokens_share")
    found = asked("explain", "--density", *where, "--context", ",".join(CONTEXTS))
    rows = [{key: row[key] for key in ("policy", "context_tokens", *kept)} for row in found]

    def speedup(context: str, density: float) -> float:
        counts = ("--counts", f"kept={density}")
        (row,) = asked("explain", "--density", *where, "--context", context, "--policy", "xattention", *counts)
        return float(row["attention_speedup"])

    low, high = 0.0, 0.2  # the speed-up falls with the share that is kept
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if speedup("256k", middle) > PUBLISHED_SPEEDUP else (low, middle)
    return {"rows": rows, "speedup_at_published_density": speedup("128k", PUBLISHED_DENSITY), "kept_at_256k": high}


def page(result: dict[str, Any]) -> str:
    """Shares by policy and context, and what LazyLLM and XAttention report beside them."""
    by = {}
    for row in result["rows"]:
        by.setdefault(row["policy"], []).append(row)
    tokens = by["lazyllm"][0]["tokens_share"]
    return (
        "# What sparse prefills leave out, measured\n\n"
        + paragraph(
            written_by("sparse_prefill", result),
            "`kvsim explain --density`, Llama-3.1-8B: FLOPs of attention as a share of the dense ones, and what it "
            "takes to choose, in the same unit. What the columns mean: `docs/prefill.md`.",
        )
        + "\n"
        + table(
            ("policy", *CONTEXTS, "tokens computed", "by hand"),
            [
                [
                    f"`{policy}`",
                    *(
                        f"{row['attention_share']:.1%}"
                        + f" + {row['choosing_share']:.1%}" * (row["choosing_share"] > 0)
                        for row in rows
                    ),
                    f"{rows[0]['tokens_share']:.1%}",
                    BY_HAND[policy],
                ]
                for policy, rows in by.items()
            ],
        )
        + "\n"
        + paragraph(
            f"XAttention's density is the data's. Where it keeps the {PUBLISHED_DENSITY:.1%} that are reported for "
            f"128K (as recalled), attention is {result['speedup_at_published_density']:.1f} times as fast here; the "
            f"{PUBLISHED_SPEEDUP}x reported for 256K takes a share of {result['kept_at_256k']:.1%}. HiP scores keys "
            f"at places that data decide, and its plan reads them so. LazyLLM's {tokens:.0%} of tokens allow "
            f"{1 / tokens:.1f}x fewer FLOPs; its 2.34x in TTFT must come from computing fewer of them before the "
            "first token than until the end.",
        )
    )
