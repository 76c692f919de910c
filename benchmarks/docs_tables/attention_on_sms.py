"""Decode attention's thread blocks on the SMs of an A100, beside the published times of two kernels."""

from typing import Any

from benchmarks.docs_tables.markdown import paragraph, share, table
from benchmarks.docs_tables.runs import asked, written_by

PUBLISHED = (  # batch, keys; microseconds of FlashAttention v2.0.9 and FlashDecoding, as recalled
    (256, 256, 390.5, 63.4),
    (64, 1024, 364.8, 77.7),
    (16, 4096, 401.7, 57.0),
    (8, 8192, 529.2, 56.4),
    (2, 32768, 1156.1, 60.3),
    (1, 65536, 2300.6, 64.4),
    (1, 131072, 4592.2, 106.6),
)
KERNELS = ("flash-attention-2", "flash-decoding", "lean")


def measure(_limit: int | None) -> dict[str, Any]:
    """16 query heads over 2 KV heads of 128: one rank of four of Llama-3.1-70B."""
    rows = []
    for batch, keys, *published in PUBLISHED:
        shape = ("--model", "llama-3.1-70b", "--tp", "4", "--context", str(keys), "--batch", str(batch))
        launches = asked("explain", "--occupancy", "--gpu", "a100-80g-sxm", *shape)
        found = {launch["kernel"]: launch["seconds"] for launch in launches if launch["phase"] == "decode"}
        rows.append({"batch": batch, "keys": keys, "published_us": published, "seconds": found})
    return {"rows": rows}


def page(result: dict[str, Any]) -> str:
    """Published and computed times beside each other, and the errors where blocks have much to read and little."""
    rows = result["rows"]
    far = {
        long: [
            max(
                abs(1e6 * row["seconds"][kernel] / row["published_us"][i] - 1)
                for row in rows
                if (row["keys"] >= 1024) == long
            )
            for i, kernel in enumerate(KERNELS[:2])
        ]
        for long in (True, False)
    }
    return (
        "# Attention on the SMs, measured\n\n"
        + paragraph(
            written_by("attention_on_sms", result),
            "Decode attention of 16 query heads over 2 KV heads of 128 on an A100, microseconds: FlashAttention "
            "v2.0.9 and FlashDecoding as published (pytorch.org/blog/flash-decoding, as recalled), and what blocks, "
            "waves and the A100's eager rate come to. How blocks are counted: `docs/prefill.md`.",
        )
        + "\n"
        + table(
            ("batch x keys", "FlashAttention", "kvsim", "FlashDecoding", "kvsim", "LeanAttention by kvsim"),
            [
                [
                    f"{row['batch']} x {row['keys']:,}",
                    *(
                        cell
                        for published, kernel in zip(row["published_us"], KERNELS, strict=False)
                        for cell in (f"{published:,.1f}", f"{1e6 * row['seconds'][kernel]:,.0f}")
                    ),
                    f"{1e6 * row['seconds']['lean']:,.0f}",
                ]
                for row in rows
            ],
        )
        + "\n"
        + paragraph(
            f"Where a block has 1,024 keys or more to read the times are within {share(max(far[True]))} of the "
            f"published ones; below, within {share(far[False][0])} (FlashAttention) and {share(far[False][1])} "
            "(FlashDecoding).",
        )
    )
