"""Dense prefill times from the MInference repository, on one A100."""

from kvsim import load_gpu, load_host, load_model
from kvsim.hardware.machine import Machine
from published.comparison import Comparison, Section
from published.pricing import Priced

PREFILL_S = ((10_000, 0.976), (50_000, 8.529), (100_000, 24.883), (200_000, 79.392), (1_000_000, 1765.6))

PROSE = """\
Llama-3-8B-1M with FlashAttention-2 on one A100, whole prompts at batch 1. The A100's eager rates, 53 % of the peak
for GEMMs and attention alike, come from this very table: one constant for five lengths, so the rows test the FLOPs and
how they grow rather than the constant."""


def section() -> Section:
    """Prefill from 10K to 1M tokens."""
    machine = Machine(gpu=load_gpu("a100-80g-sxm@eager"), host=load_host("ddr4-dual-xeon"))
    full = Priced("full", load_model("llama-3-8b-1m"), machine)
    rows = tuple(
        Comparison(
            what=f"prefill, {tokens:,} tokens", unit="s", published=seconds, source="R", kvsim=full.prefill_s(tokens)
        )
        for tokens, seconds in PREFILL_S
    )
    return Section(title="Dense prefill (MInference repository)", prose=PROSE, comparisons=rows)
