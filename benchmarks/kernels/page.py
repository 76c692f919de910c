"""docs/measured/kernel_prices.md: errors of the fitted constants, written by `benchmarks/kernel_fit.py`."""

from collections.abc import Sequence
from typing import Any

INTRODUCTION = """\
# Prices of kernels, against measured ones

Written by `python benchmarks/kernel_fit.py FOLDER`. The constants of `load_gpu(name).kernels` in the `serving` set are
fitted to tables of NVIDIA AIConfigurator (commit 095f58a5, Apache-2.0, half of the rows): vLLM 0.24 kernels on H100
SXM, B200 SXM and L40S, vLLM 0.14 on A100 SXM, head_dim 128. Two thirds of the *shapes* were seen by the fit and one
third was not: a GEMM's shape is (n, k), attention's its batch and heads, an expert layer's all but its tokens; all rows
of a shape are on one side. Rows that are quicker than the datasheet allows are dropped (matrices and caches that a
repeated measurement finds in L2). MAPE is the mean of |price / measured - 1|, bias the mean of price / measured - 1.

"""
NOTES = """\

What the figures hide:

- Block-wise fp8 GEMMs were measured with kernels that the host launches: below some 60 us (H100), 180 us (B200) and
  340 us (L40S) the table is the host's time. `gemm_s(..., captured=True)` leaves it out, as a CUDA graph does.
- Tensor-wise and block-wise fp8 quantise the activations in a kernel of their own, which the price includes.
- cuBLAS picks kernels on the L40S that differ by a factor of 1.3 between neighbouring shapes; no smooth form follows.
- The A100's experts ran with kernels tuned for some shapes only; the price is of neither kind.
- Experts' loads under a power law are drawn at random in the tables, and priced by their expectation.
- The L40S's decode table has rows whose cache partly lies in L2, which the price, made for a model's layers in turn,
  does not follow.
"""


def document(rows: Sequence[dict[str, Any]], composites: Sequence[dict[str, Any]]) -> str:
    """The page as Markdown."""
    lines = [
        "| GPU | kernel | type | rows | dropped | MAPE seen | unseen | bias seen | unseen |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {r['gpu']} | {r['kernel']} | {r['dtype']} | {r['rows']:,} | {r['dropped']} | {r['mape_seen']:.1%} "
        f"| {r['mape_unseen']:.1%} | {r['bias_seen']:+.1%} | {r['bias_unseen']:+.1%} |".replace("%", " %")
        for r in rows
    ]
    text = INTRODUCTION + "\n".join(lines) + "\n" + NOTES
    text += "\n## Steps as sums of kernels\n\n"
    text += "One layer, kernels of the nearest shapes that the tables have, microseconds.\n\n"
    text += "| GPU | model | step | priced | measured | error |\n|---|---|---|--:|--:|--:|\n"
    for r in composites:
        error = r["priced_s"] / r["measured_s"] - 1
        text += (
            f"| {r['gpu']} | {r['model']} | {r['step']} | {r['priced_s'] * 1e6:,.0f} | {r['measured_s'] * 1e6:,.0f} "
        )
        text += f"| {error:+.1%} |\n".replace("%", " %")
    return text
