"""Quest's latencies, arXiv:2406.10774: Llama-2-7B on an RTX 6000 Ada, and its attention alone on an RTX 4090."""

from dataclasses import replace

from kvsim import load_gpu, load_host, load_model
from kvsim.hardware.machine import Machine
from published.comparison import Comparison, Section
from published.pricing import Priced

LATENCY_MS = {  # fp16 weights, at 8K, 16K and 32K
    "full": (21.6, 26.6, 36.8),
    "quest:budget_tokens=512": (17.7, 18.5, 20.3),
    "quest:budget_tokens=2048": (18.6, 19.4, 21.2),
    "quest:budget_tokens=4096": (19.8, 20.7, 22.4),
}
CONTEXTS = (8, 16, 32)  # K tokens of 1024

PROSE = """\
Llama-2-7B, batch 1, pages of 16, the first two layers dense. The RTX 6000 Ada is not in the catalogue; it is the L40S,
of the same chip, with its memory rates scaled from 864 to 960 GB/s (both NVIDIA's datasheets). The baseline is
FlashInfer. The attention ratio is one layer's dense attention over `score`, `select` and `attend` on an RTX 4090."""


def section() -> Section:
    """Milliseconds per token, and the speed-up of attention."""
    model = load_model("llama-2-7b")
    host = load_host("ddr4-dual-xeon")
    l40s = load_gpu("l40s@eager")
    faster = {name: getattr(l40s.rates, name) * 960 / 864 for name in ("hbm_Bps", "elementwise_Bps")}
    ada = Machine(gpu=replace(l40s, name="rtx-6000-ada", rates=replace(l40s.rates, **faster)), host=host)
    rows = []
    for policy, published in LATENCY_MS.items():
        priced = Priced(policy, model, ada)
        for kilo, there_ms in zip(CONTEXTS, published, strict=True):
            here_ms = 1e3 * priced.decode_s(kilo * 1024)
            rows.append(_row(f"per token, {policy}, {kilo}K", "ms", there_ms, here_ms, "L40S with 960 GB/s"))
    rtx = Machine(gpu=load_gpu("rtx-4090@eager"), host=host)
    dense = Priced("full", model, rtx).decode_ops_s(32 * 1024)
    sparse = Priced("quest:budget_tokens=2048", model, rtx).decode_ops_s(32 * 1024)
    ratio = dense["attend"] / (sparse["score"] + sparse["select"] + sparse["attend"])
    rows.append(_row("attention speed-up, 32K, budget 2048", "x", 7.03, ratio, "RTX 4090"))
    return Section(title="Quest (arXiv:2406.10774)", prose=PROSE, comparisons=tuple(rows))


def _row(what: str, unit: str, published: float, found: float, assumption: str) -> Comparison:
    return Comparison(what=what, unit=unit, published=published, source="R", kvsim=found, assumption=assumption)
