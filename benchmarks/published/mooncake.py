"""Mooncake (FAST'25): when a cached prefix is worth loading, and what a cache of a given size hits."""

import traces
from kvsim import load_gpu, load_model
from policies import Full, Step, plan_layer
from policies.plan import flops
from published.comparison import Comparison, Section
from traces.stats import infinite_cache_hit_ratio, lru_hit_ratio

PROMPT_TOKENS = 8192
LRU_TOKENS = 3_000_000

PROSE = """\
Loading a cached prefix beats computing it when bandwidth / FLOP rate exceeds KV bytes / prefill FLOPs. kvsim counts the
FLOPs of Llama-3-70B's plan, causal attention and the shape's own weights, at the datasheet's dense bf16 peak; the paper
uses 4 p d + 22 d^2 per token and layer (attention over the whole square, a narrower MLP), which here makes 26 d^2 where
the plan has 27.5. A800 and H800 are computed as A100 and H100, whose tensor cores they have. The shares of the LRU are
measured on the bundled traces with blocks of 512 tokens, against the hit ratio of an infinite cache; they are compared
with figures computed once from the same public traces, so these two rows check the bundled files and the replay."""

BREAK_EVEN = (("A800", "a100-80g-sxm@datasheet", 6.0, 5.86), ("H800", "h100-sxm@datasheet", 19.0, 18.57))
LRU_SHARES = (("mooncake-conversation", 0.37), ("mooncake-synthetic", 0.48))


def section() -> Section:
    """Break-even bandwidths, cache sizes and LRU shares."""
    model = load_model("llama-3-70b")
    step = Step(prompt_tokens=PROMPT_TOKENS, past_tokens=0, new_tokens=PROMPT_TOKENS)
    prefill_flops = sum(
        2 * (layer.qkv_params + layer.out_params + layer.mlp_params) * PROMPT_TOKENS
        + flops(plan_layer(Full(), model, step, index).ops, {})
        for index, layer in enumerate(model.layers)
    )
    rows = []
    for name, gpu, published, recomputed in BREAK_EVEN:
        node_flops = 8 * load_gpu(gpu).rates.flops("bf16")
        found = model.kv_bytes(PROMPT_TOKENS) / prefill_flops * node_flops / 1e9
        rows.append(_row(f"break-even bandwidth, 8 x {name}", "GB/s", published, "R", found))
        rows.append(
            _row(f"break-even bandwidth, 8 x {name}", "GB/s", recomputed, "C", found, "published: the paper's formula")
        )
    rows += [
        _row("KV cache of one token", "B", 327_680, "R", model.kv_bytes(1)),
        _row("KV cache of 128K tokens", "GiB", 40.0, "C", model.kv_bytes(131_072) / 2**30),
        _row("tokens in 1 TB", "M tokens", 3, "R", 1e12 / model.kv_bytes(1) / 1e6, "about 3, the paper says"),
    ]
    for name, published in LRU_SHARES:
        trace = traces.load(name)
        blocks = LRU_TOKENS // (trace.block_tokens or 1)
        share = (lru_hit_ratio(trace, blocks) or 0) / (infinite_cache_hit_ratio(trace) or 1)
        rows.append(_row(f"LRU of 3 M tokens, {name}", "of the maximum", published, "C", share))
    return Section(title="Mooncake (FAST'25)", prose=PROSE, comparisons=tuple(rows))


def _row(what: str, unit: str, published: float, source: str, found: float, assumption: str = "") -> Comparison:
    return Comparison(what=what, unit=unit, published=published, source=source, kvsim=found, assumption=assumption)
