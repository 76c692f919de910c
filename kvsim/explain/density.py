"""What a policy leaves out of a prompt's prefill, attention pairs and deeper layers' tokens, and what choosing costs.

Derived from the policy's plan of the whole prompt beside that of the dense cache, so any policy can be asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvsim.hardware.machine import Machine, access_bytes
from policies import Full, LayerPlan, ModelShape, Policy, Step, plan_layer
from policies.layer import LayerShape
from policies.plan import Compute, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Density:
    """A prompt's prefill under a policy beside dense attention, all layers and one rank; shares are of the dense ones.

    `computed_tokens` are those that each layer computes, as a mean over layers; projections and MLP would need no more
    (the simulator charges all, see `policies.LazyLLM`), which is what `linear_flops` and `whole_share` count.
    """

    context_tokens: int
    attention_share: float  # the density: FLOPs of attention, of the dense cache's
    choosing_share: float  # FLOPs spent on choosing what to compute, of the dense cache's attention
    attention_flops: int
    dense_attention_flops: int
    read_bytes: int  # of keys, values and estimates, by attention and by choosing
    dense_read_bytes: int
    computed_tokens: tuple[int, ...]  # by layer
    tokens_share: float
    linear_flops: int
    whole_share: float  # FLOPs of attention, choosing, projections and MLP, of those of a dense prefill
    attention_speedup: float  # of the time of attention and choosing


def density(policy: Policy, model: ModelShape, tokens: int, machine: Machine, shares: Mapping[str, float]) -> Density:
    """The density of one prompt of `tokens`, processed in one step; `shares` replaces means of counts.

    Raises ValueError as `plan_layer` does, and for contexts below one token.
    """
    if tokens < 1:
        raise ValueError(f"context_tokens={tokens} must be at least 1")
    step = Step(prompt_tokens=tokens, past_tokens=0, new_tokens=tokens)
    attention = choosing = dense = read = dense_read = linear = 0
    seconds = dense_s = 0.0
    computed = []
    for index, layer in enumerate(model.layers):
        plan, full = (plan_layer(one, model, step, index) for one in (policy, Full()))
        (own, chosen, own_bytes, own_s), (whole, _, whole_bytes, whole_s) = (
            _attention(one, machine, shares, layer, model.kv_dtype) for one in (plan, full)
        )
        attention, choosing, dense = attention + own, choosing + chosen, dense + whole
        read, dense_read = read + own_bytes, dense_read + whole_bytes
        seconds, dense_s = seconds + own_s, dense_s + whole_s
        kept = _computed(plan, tokens)
        computed.append(kept)
        linear += 2 * kept * (layer.qkv_params + layer.out_params + layer.mlp_active_params)
    all_linear = 2 * tokens * (model.active_params - model.head_params)
    return Density(
        context_tokens=tokens,
        attention_share=attention / dense,
        choosing_share=choosing / dense,
        attention_flops=attention,
        dense_attention_flops=dense,
        read_bytes=read,
        dense_read_bytes=dense_read,
        computed_tokens=tuple(computed),
        tokens_share=sum(computed) / (tokens * model.n_layers),
        linear_flops=linear,
        whole_share=(attention + choosing + linear) / (dense + all_linear),
        attention_speedup=dense_s / seconds,
    )


def _attention(
    plan: LayerPlan, machine: Machine, shares: Mapping[str, float], layer: LayerShape, kv_dtype: str
) -> tuple[int, int, int, float]:
    """FLOPs of attending and of choosing, bytes that both read, and the seconds that both take one after the other."""
    totals = {count.name: count.expected(shares.get(count.name)) for count in plan.counts}
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    attending = choosing = read = 0
    seconds = 0.0
    for op in plan.ops:
        if not isinstance(op, Compute) or op.name == "append":
            continue
        rows = op.rows.at(totals)
        work = rows if op.work is Work.TOPK else rows * op.flops_per_row
        if op.work is Work.ATTENTION:
            attending += work
        elif op.work is not Work.TOPK:
            choosing += work
        nbytes = access_bytes((*op.reads, *op.writes), buffers, totals)
        read += access_bytes(op.reads, buffers, totals)
        cost = machine.cost(op, buffers, layer, kv_dtype, prefill=True)
        seconds += cost.fixed_s + max(work * cost.work_s + nbytes * cost.walked_s, nbytes * cost.streamed_s)
    return attending, choosing, read, seconds


def _computed(plan: LayerPlan, tokens: int) -> int:
    """The tokens whose keys a layer computes: the rows that it appends."""
    appends = [op for op in plan.ops if isinstance(op, Compute) and op.name.rpartition(".")[2] == "append"]
    rows = [access.rows.fixed for op in appends for access in op.reads]
    return max(rows, default=tokens)


def drawn_counts(policy: Policy, model: ModelShape, tokens: int) -> set[str]:
    """The counts that data decide in such a prefill."""
    step = Step(prompt_tokens=tokens, past_tokens=0, new_tokens=tokens)
    return {c.name for index in range(model.n_layers) for c in plan_layer(policy, model, step, index).counts}
