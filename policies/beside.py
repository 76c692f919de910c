"""What a layer caches and computes beside its attention, whatever the policy: an indexer's keys, a mixer's state."""

from policies.dense import block_pairs, causal_pairs
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Step, Tier, Work


def beside_attention(model: ModelShape, step: Step, layer: int) -> tuple[tuple[Buffer, ...], Plan]:
    """Buffers and operations beside those of the layer's policy; attention waits for the operations."""
    shape, buffers, ops = model.layers[layer], [], []
    if shape.index_dim:
        buffers.append(
            Buffer("indexer_keys", Tier.HBM, shape.index_rows(step.tokens), (shape.index_dim,), model.kv_dtype)
        )
        ops.append(_index(shape, step))
    if shape.state_elements and shape.kind != "linear":
        buffers.append(Buffer("mixer_state", Tier.HBM, 1, (shape.state_elements,), model.dtype))
        ops.append(_mix(shape, step.new_tokens))
    return tuple(buffers), tuple(ops)


def _index(layer: LayerShape, step: Step) -> Compute:
    """Append the new keys, and score all that each new token may attend to."""
    rows = layer.index_rows(step.tokens)
    if layer.kind == "compressed":
        pairs = block_pairs(step.past_tokens, step.new_tokens, layer.block_tokens)
    else:
        pairs = causal_pairs(step.past_tokens, step.new_tokens)
    return Compute(
        name="indexer",
        work=Work.ATTENTION,
        rows=Rows(pairs),
        flops_per_row=2 * layer.index_heads * layer.index_dim,
        reads=(Access("indexer_keys", Rows(rows)),),
        writes=(Access("indexer_keys", Rows(rows - layer.index_rows(step.past_tokens))),),
        after=("qkv",),
    )


def _mix(layer: LayerShape, new_tokens: int) -> Compute:
    """Two FLOPs a state element to decay and add, two to read it out, for each token."""
    return Compute(
        name="mixer",
        work=Work.ATTENTION,
        rows=Rows(new_tokens),
        flops_per_row=4 * layer.state_elements,
        reads=(Access("q", Rows(new_tokens)), Access("mixer_state", Rows(1))),
        writes=(Access("mixer_state", Rows(1)),),
        after=("qkv",),
    )
