"""A policy of one's own, simulated and run: keys stay in HBM, values lie in DDR and come back layer by layer.

python examples/own_policy.py [REQUESTS]
PYTHONPATH=examples kvsim validate --bytes --policy own_policy:ValuesOnHost

The class is all that the simulator needs. The function `method` beside it is what the runtime looks for: a kernel for
each `Compute` of the plan, a route for each `Copy`.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvsim import load_scenario, simulate, summarize
from policies import ModelShape, Policy, Reuse, Step
from policies.dense import activations, append, attend, causal_pairs
from policies.plan import Access, Buffer, Copy, Plan, Rows, Tier

if TYPE_CHECKING:
    from runtime import Call, Method, Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuesOnHost(Policy):
    """Exact attention with half of the cache in DDR, through `staging_layers` buffers in HBM."""

    name: ClassVar[str] = "values-on-host"
    paper: ClassVar[str] = "an example"
    reuse: ClassVar[Reuse] = Reuse.BLOCKS

    staging_layers: int = 2

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """What is stored: one row per token in each; bytes follow from rows, shape and dtype."""
        shape = model.layers[layer]
        k_row, v_row = (shape.kv_heads, shape.head_dim), (shape.kv_heads, shape.v_head_dim)
        return (
            *activations(model, step, layer),
            Buffer("keys", Tier.HBM, step.tokens, k_row, model.kv_dtype),
            Buffer("values", Tier.HBM, step.tokens, v_row, model.kv_dtype, ring=self.staging_layers),
            Buffer("values_host", Tier.DDR, step.tokens, v_row, model.kv_dtype),
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Fetch the earlier values once the staging buffer is free, append, attend, send the new values down."""
        free = (f"attend@-{self.staging_layers}", f"store@-{self.staging_layers}")
        past, new = step.past_tokens, step.new_tokens
        fetch = (Copy(name="fetch", src="values_host", dst="values", rows=Rows(past), after=free),) if past else ()
        held = Rows(step.tokens)
        reads = (Access("keys", held), Access("values", held))
        pairs = Rows(causal_pairs(past, new))
        return (
            *fetch,
            append(step, ("keys", "values"), ("new_k", "new_v"), after=free),
            attend(model.layers[layer], step, pairs, reads, after=("append", *(op.name for op in fetch))),
            Copy(name="store", src="values", dst="values_host", rows=Rows(new), after=("append",)),
        )

    decode = prefill  # a generated token is a chunk of one


def method(_policy: Policy) -> "Method":
    """The torch code: `call.state` has the buffers as (batch, rows, *row_shape)."""
    from runtime import Method
    from runtime.dense import attend as exact

    def append(call: "Call") -> None:
        new = slice(call.step.past_tokens, call.step.tokens)
        call.state["keys"][:, new].copy_(call.new_k.transpose(1, 2))
        call.state["values"][:, new].copy_(call.new_v.transpose(1, 2))

    def attend(call: "Call") -> None:
        keys, values = (call.state[name][:, : call.step.tokens].transpose(1, 2) for name in ("keys", "values"))
        call.out = exact(call, keys, values, call.mask)

    def fetch(call: "Call") -> "list[Piece]":
        past = slice(0, call.step.past_tokens)
        return [(call.state["values"][:, past], call.state["values_host"][:, past])]

    def store(call: "Call") -> "list[Piece]":
        new = slice(call.step.past_tokens, call.step.tokens)
        return [(call.state["values_host"][:, new], call.state["values"][:, new])]

    kernels = {"append": append, "attend": attend}
    return Method(kernels=kernels, routes={"fetch": fetch, "store": store}, extends=True, crops=True)


def simulated(requests: int) -> None:
    """What the policy would cost for the head of a recorded trace."""
    options = {"trace": "mooncake-conversation", "limit": requests, "model": "llama-3.1-8b", "gpu": "h100-sxm"}
    for policy in ("full", f"{__name__}:ValuesOnHost"):
        asked = load_scenario({**options, "policy": policy, "rate_scale": 0.2})
        summary = summarize(simulate(asked.load_trace(), asked.setups()[0]))
        hbm_gib = summary["memory"]["gpu0.hbm"]["peak_bytes"] / 2**30
        print(f"{policy}: {hbm_gib:.1f} GiB of HBM at the peak, {summary['tpot_s']['p50'] * 1e3:.2f} ms per token")


def run() -> None:
    """What it does inside `generate`, on the trained model that comes with kvsim."""
    import torch

    from runtime import offload
    from runtime.loading import load_model, model_folder

    with model_folder("needle-28m") as folder:
        model = load_model(folder, "cpu")
    prompt = torch.randint(3, 8192, (1, 200), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 10, "do_sample": False}
    stock = model.generate(prompt, **options)
    with offload(model, ValuesOnHost(), max_new_tokens=10) as kv:
        cache = kv.cache()
        out = model.generate(prompt, past_key_values=cache, **options)
        print(f"tokens as without it: {torch.equal(out, stock)}")
        for tier, nbytes in sorted(kv.footprint_bytes.items()):
            print(f"holds {nbytes:,} bytes in {tier}")


def main(requests: int = 100) -> None:
    """Simulate the policy, then run it."""
    simulated(requests)
    run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
