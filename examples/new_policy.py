"""A policy of one's own, without touching the project: the whole cache in HBM, quantised, as KIVI does (2402.02750).

python examples/new_policy.py [REQUESTS]
PYTHONPATH=examples kvsim simulate --policy new_policy:QuantizedCache:dtype=int8 --trace ... --model ... --gpu ...
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from kvsim import load_scenario, simulate, summarize
from policies import ModelShape, Policy, Reuse, Step
from policies.dense import activations, append, attend, causal_pairs, kv_row
from policies.dtypes import check_dtype
from policies.plan import Access, Buffer, Plan, Rows, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedCache(Policy):
    """Exact attention over keys and values that are stored in `dtype`."""

    name: ClassVar[str] = "quantized-cache"
    paper: ClassVar[str] = "KIVI, Liu et al. 2024, arXiv:2402.02750"
    reuse: ClassVar[Reuse] = Reuse.BLOCKS

    dtype: str = "int4"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """What is stored: one row per token; its bytes, scales included, follow from shape and dtype."""
        kv = Buffer("kv", Tier.HBM, step.tokens, kv_row(model.layers[layer]), self.dtype)
        return (*activations(model, step, layer), kv)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """What a chunk of the prompt does: append, then attend to all that is stored."""
        pairs, stored = causal_pairs(step.past_tokens, step.new_tokens), Rows(step.tokens)
        return (append(step), attend(model.layers[layer], step, Rows(pairs), (Access("kv", stored),)))

    decode = prefill  # a generated token is a chunk of one


def main(requests: int = 100) -> None:
    """Simulate the dense cache and the quantised one on the same requests."""
    options = {"trace": "mooncake-conversation", "limit": requests, "model": "llama-3.1-8b", "gpu": "h100-sxm"}
    for policy in ("full", f"{__name__}:QuantizedCache:dtype=int8", f"{__name__}:QuantizedCache:dtype=int4"):
        asked = load_scenario({**options, "policy": policy, "rate_scale": 0.2})
        summary = summarize(simulate(asked.load_trace(), asked.setups()[0]))
        hbm_gib = summary["memory"]["gpu0.hbm"]["peak_bytes"] / 2**30
        print(f"{policy}: {hbm_gib:.1f} GiB of HBM at the peak, {summary['tpot_s']['p50'] * 1e3:.2f} ms per token")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
