"""Prompts of different lengths in one batch: padded, sorted, packed, unpadded and in chunks."""

from typing import Any

from benchmarks.docs_tables.markdown import holding, paragraph, table
from benchmarks.docs_tables.runs import asked, written_by

PROMPTS = 512
BATCHES = (("azure-2023-conv", 64), ("azure-2023-conv", 8), ("azure-2023-code", 64), ("mooncake-conversation", 16))


def measure(limit: int | None) -> dict[str, Any]:
    """Seconds of each way to batch."""
    prompts = min(PROMPTS, limit or PROMPTS)
    rows = []
    for trace, batch in BATCHES:
        found = asked("trace", "batching", trace, "--limit", str(prompts), "--batch", str(batch))["schemes"]
        rows.append({"trace": trace, "batch": batch, "seconds": {row["scheme"]: row["seconds"] for row in found}})
    return {"prompts": prompts, "rows": rows}


def page(result: dict[str, Any]) -> str:
    """The table, and packing's gain beside its authors'."""
    rows = result["rows"]
    schemes = list(rows[0]["seconds"])
    first, small = rows[0]["seconds"], rows[1]["seconds"]
    return (
        "# Prompts of different lengths in one batch, measured\n\n"
        + paragraph(
            written_by("batching", result),
            f"`kvsim trace batching`: Llama-3.1-8B on an A100, the first {result['prompts']} prompts of each trace, "
            "so many to a batch, chunks of 8,192 tokens. What the ways are: `docs/prefill.md`.",
        )
        + "\n"
        + table(
            ("trace, batch", *schemes),
            [[f"{row['trace']}, {row['batch']}", *(f"{row['seconds'][x]:,.3g} s" for x in schemes)] for row in rows],
        )
        + "\n"
        + paragraph(
            "Prepacking's authors report 5.2x over padded and 1.49x over sorted batches (64 prompts of MMLU, a 1.3B "
            f"model, A6000); on Azure's conversations it is {first['padded'] / first['packed']:.1f}x and "
            f"{first['padded, sorted'] / first['packed']:.1f}x here, MMLU's lengths not being at hand.",
            *holding(
                (
                    small["padded, sorted"] < small["packed"],
                    (
                        "In small batches sorting beats packing: a bin is as long as one long prompt, and few others "
                        "are there to fill it."
                    ),
                ),
            ),
        )
    )
