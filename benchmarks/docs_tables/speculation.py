"""Several tokens per decode step, at three loads, with four ways to guess."""

from typing import Any

import numpy as np

from benchmarks.docs_tables.markdown import holding, paragraph, table
from benchmarks.docs_tables.runs import asked, summary, written_by
from kvsim import format_s

BASE = {"trace": "azure-2023-conv", "model": "llama-3.1-70b", "gpu": "h100-sxm", "gpus": 4, "tp": 4, "limit": 1000}
RATES = (0.2, 0.5, 1.0)
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("Llama-3.2-1B, K = 4, 0.7", {"speculate": 4, "acceptance": 0.7, "draft": "llama-3.2-1b"}),
    ("lookup, K = 4, 0.3", {"speculate": 4, "acceptance": 0.3, "draft": "lookup"}),
    ("Medusa, K = 5, 0.7, 63 candidates", {"speculate": 5, "acceptance": 0.7, "draft": "medusa", "tree": 63}),
)
DRAFTS = ((7, 0.75, 0.02, 3.2), (7, 0.80, 0.04, 3.3), (7, 0.82, 0.11, 2.5))  # K, acceptance, share, published
MEDUSA_TOKENS, MEDUSA_OVERHEAD = 3.47, 1.22  # of Medusa-2 on Vicuna-7B, a step


def measure(limit: int | None) -> dict[str, Any]:
    """Latencies of every way at every load; and single steps, by `explain`."""
    rows = []
    for way, options in WAYS:
        runs = [summary({**BASE, **options, "rate_scale": rate}, limit) for rate in RATES]
        rows.append({"way": way, **{f"{x}_p50_s": [run[f"{x}_s"]["p50"] for run in runs] for x in ("ttft", "tpot")}})
    target = ("--model", "llama-3.1-70b", "--gpu", "a100-80g-sxm", "--tp", "8", "--context", "512")
    drafts = []
    for k, acceptance, taken, published in DRAFTS:
        guess = ("--speculate", str(k), "--acceptance", str(acceptance), "--draft-share", str(taken))
        emitted = (1 - acceptance ** (k + 1)) / (1 - acceptance)
        drafts.append(
            {
                "published": published,
                "formula": emitted / (k * taken + 1),
                "priced": _step_s(*target) / _step_s(*target, *guess),
            }
        )
    roots = np.roots([1, 1, 1, 1, 1, 1 - MEDUSA_TOKENS])  # 1 + a + ... + a^5 is what a step emits
    acceptance = next(float(root.real) for root in roots if abs(root.imag) < 1e-9 and 0 < root.real < 1)
    small = ("--model", "llama-2-7b", "--gpu", "a100-80g-sxm", "--context", "1024")
    heads = ("--speculate", "5", "--acceptance", f"{acceptance:.9f}", "--draft", "medusa", "--tree", "63")
    mixtral = ("--model", "mixtral-8x7b", "--gpu", "h200-sxm", "--context", "4096")
    four = ("--speculate", "3", "--acceptance", "1", "--draft", "lookup")
    return {
        "requests": min(BASE["limit"], limit or BASE["limit"]),
        "rows": rows,
        "drafts": drafts,
        "medusa_overhead": MEDUSA_TOKENS * _step_s(*small, *heads) / _step_s(*small),
        "mixtral_four_tokens": 4 * _step_s(*mixtral, *four) / _step_s(*mixtral),
    }


def _step_s(*arguments: str) -> float:
    """Seconds a token of the dense cache's decoding."""
    (row,) = asked("explain", "--policy", "full", *arguments)
    return float(row["decode_s_per_token"])


def page(result: dict[str, Any]) -> str:
    """Latencies by way and load, then published steps."""
    none, *guessed = result["rows"]
    slower = [row["way"] for row in guessed if row["tpot_p50_s"][-1] > none["tpot_p50_s"][-1]]
    crowded = [row["way"] for row in guessed if row["ttft_p50_s"][-1] > 10 * none["ttft_p50_s"][-1]]
    drafts = result["drafts"]
    published = ", ".join(f"{row['published']:.1f}" for row in drafts)
    formula, priced = (", ".join(f"{row[key]:.2f}" for row in drafts) for key in ("formula", "priced"))
    return (
        "# Several tokens per decode step, measured\n\n"
        + paragraph(
            written_by("speculation", result),
            f"The first {result['requests']:,} of Azure's conversations at {', '.join(map(str, RATES))} times their "
            "rate, Llama-3.1-70B on 4 H100s (`--tp 4`); median TPOT at each rate, and median TTFT at the highest. "
            "What the options mean: `docs/prefill.md`.",
        )
        + "\n"
        + table(
            ("guesses", *(f"TPOT, {rate:g}x" for rate in RATES), f"TTFT, {RATES[-1]:g}x"),
            [
                [row["way"], *map(format_s, row["tpot_p50_s"]), format_s(row["ttft_p50_s"][-1])]
                for row in result["rows"]
            ],
        )
        + "\n"
        + paragraph(
            *holding(
                (
                    all(row["tpot_p50_s"][0] < none["tpot_p50_s"][0] for row in guessed),
                    "At light load verifying is nearly free, and every way is faster than none.",
                ),
                (
                    bool(slower),
                    (
                        "At the full rate the step is bound by arithmetic, and guessing is slower with "
                        f"{' and '.join(slower)}."
                    ),
                ),
                (
                    bool(crowded),
                    f"With {' and '.join(crowded)} requests wait for each other: the load cannot be served.",
                ),
            ),
            "With routed experts verifying is dearer, since several tokens touch more of them: a step of four tokens "
            f"of Mixtral-8x7B takes {result['mixtral_four_tokens']:.1f} times as long as one of a single token (one "
            "sequence of 4K, an H200).",
        )
        + "\n## Published steps\n\n"
        + table(
            ("published", "figure", "kvsim"),
            [
                [
                    "expected speedup of T5-XXL with three drafts (arXiv:2211.17192, appendix)",
                    published,
                    f"{formula} by the formula; a 70B model on 8 A100s, which multiplies 7 more tokens: {priced}",
                ],
                [
                    (
                        "Medusa-2 on Vicuna-7B, 3.47 tokens a step and 2.83 x as fast: times as long a step "
                        "(arXiv:2401.10774, table 1)"
                    ),
                    f"{MEDUSA_OVERHEAD}",
                    (
                        f"{result['medusa_overhead']:.2f}: that paper's plain decoding has launches to hide the "
                        "arithmetic in"
                    ),
                ],
            ],
            left=3,
        )
        + "\n"
        + paragraph(
            "Published figures of both papers are as recalled, not checked against their text; each agrees with its "
            "own formula to the digits given.",
        )
    )
