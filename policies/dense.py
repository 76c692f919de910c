"""Exact attention, the part that every policy shares: activations, appending, attending, a raw cache during prefill."""

from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Step, Tier, Work


def causal_pairs(past_tokens: int, new_tokens: int) -> int:
    """Query-key pairs when `new_tokens` attend causally to themselves and to `past_tokens`."""
    return new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2


def held_pairs(step: Step, held_tokens: int) -> int:
    """Query-key pairs of a decode step that leaves `held_tokens` in the cache, its own among them.

    Where a window has dropped tokens, each of several new ones counts one key more than the one before it did: at the
    most half their square too many.
    """
    return causal_pairs(held_tokens - step.new_tokens, step.new_tokens)


def windowed_pairs(past_tokens: int, new_tokens: int, window_tokens: int) -> int:
    """Query-key pairs when each new token attends to itself and at most `window_tokens` - 1 before it."""
    inside = max(0, min(new_tokens, window_tokens - past_tokens))  # queries that still see every earlier token
    return causal_pairs(past_tokens, inside) + (new_tokens - inside) * window_tokens


def core_pairs(past_tokens: int, new_tokens: int, window_tokens: int, group_tokens: int) -> int:
    """Query-row pairs of a core layer: what has left a token's window is one row for each group of tokens."""

    def before(tokens: int) -> int:  # groups that the first `tokens` queries see, all together
        left = max(0, tokens - window_tokens)
        groups = left // group_tokens
        return groups * (left + 1) - group_tokens * groups * (groups + 1) // 2

    groups = before(past_tokens + new_tokens) - before(past_tokens)
    return causal_pairs(past_tokens, new_tokens) - (group_tokens - 1) * groups


def block_pairs(past_tokens: int, new_tokens: int, block_tokens: int, most: int = 0) -> int:
    """Query-row pairs when each new token sees one row for each whole block of tokens so far, `most` of them if any."""

    def before(tokens: int) -> int:  # rows that the first `tokens` queries see, all together
        seen = min(tokens, most * block_tokens) if most else tokens
        blocks = seen // block_tokens
        return blocks * (seen + 1) - block_tokens * blocks * (blocks + 1) // 2 + most * (tokens - seen)

    return before(past_tokens + new_tokens) - before(past_tokens)


def pair_flops(layer: LayerShape, step: Step) -> int:
    """FLOPs of one query-key pair over all query heads: the score and the weighted value."""
    if layer.kind == "mla" and not step.prefilling:
        # Absorbed form: scores over the whole latent, values over its part without the rotary dimensions.
        rope_dim = layer.head_dim - layer.v_head_dim
        return 2 * layer.heads * (2 * layer.latent_dim - rope_dim)
    return 2 * layer.heads * (layer.head_dim + layer.v_head_dim)


def kv_row(layer: LayerShape) -> tuple[int, ...]:
    """Shape of one token's cache row: keys and values of all KV heads, or one vector that all heads share."""
    if layer.latent_dim:
        return (layer.latent_dim,)
    if layer.head_dim == layer.v_head_dim:
        return (2, layer.kv_heads, layer.head_dim)
    return (layer.kv_heads, layer.head_dim + layer.v_head_dim)


def activations(model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
    """What the model hands over in a step, as views: `q`, `new_kv` (or `new_k` and `new_v`), and `out`."""
    shape, new = model.layers[layer], step.new_tokens
    rows = {
        "q": (shape.heads, shape.head_dim),
        "new_kv": kv_row(shape),
        "new_k": (shape.kv_heads, shape.head_dim),
        "new_v": (shape.kv_heads, shape.v_head_dim),
        "out": (shape.heads, shape.v_head_dim),
    }
    return tuple(Buffer(name, Tier.HBM, new, row, model.dtype, ring=1, view=True) for name, row in rows.items())


def append(
    step: Step,
    into: tuple[str, ...] = ("kv",),
    new: tuple[str, ...] = ("new_kv",),
    per_token: int = 1,
    after: tuple[str, ...] = (),
) -> Compute:
    """Write the new tokens' rows into the cache, `per_token` cache rows each (quantising where its dtype says so)."""
    rows = step.new_tokens
    return Compute(
        name="append",
        work=Work.ELEMENTWISE,
        reads=tuple(Access(name, Rows(rows)) for name in new),
        writes=tuple(Access(name, Rows(rows * per_token)) for name in into),
        after=("qkv", *after),
    )


def attend(
    layer: LayerShape,
    step: Step,
    pairs: Rows,
    reads: tuple[Access, ...],
    *,
    name: str = "attend",
    after: tuple[str, ...] = ("append",),
    out: str = "out",
) -> Compute:
    """Exact attention of the step's queries over the rows that `reads` names, `pairs` query-key pairs in all."""
    new = step.new_tokens
    return Compute(
        name=name,
        work=Work.ATTENTION,
        rows=pairs,
        flops_per_row=pair_flops(layer, step),
        reads=(Access("q", Rows(new)), *reads),
        writes=(Access(out, Rows(new)),),
        after=after,
    )


def raw_buffers(model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
    """The prompt's keys and values as they are until it is complete, one row per token and KV head.

    A prompt that one step processes from end to end needs them for one layer at a time.
    """
    shape = model.layers[layer]
    rows, ring = shape.kv_heads * step.tokens, int(step.whole_prompt)
    return (
        Buffer("raw_keys", Tier.HBM, rows, (shape.head_dim,), model.kv_dtype, ring),
        Buffer("raw_values", Tier.HBM, rows, (shape.v_head_dim,), model.kv_dtype, ring),
    )


def raw_prefill(model: ModelShape, step: Step, layer: int, copies: tuple[str, ...] = ()) -> Plan:
    """Dense causal prefill over the raw keys and values; `copies` take them to another tier when it is complete.

    Where one pair of raw buffers serves all layers, the next layer waits for those copies.
    """
    shape = model.layers[layer]
    held = Rows(shape.kv_heads * step.tokens)
    free = tuple(f"{name}@-1" for name in copies) if step.whole_prompt else ()
    return (
        append(step, ("raw_keys", "raw_values"), ("new_k", "new_v"), shape.kv_heads, free),
        attend(
            shape,
            step,
            Rows(causal_pairs(step.past_tokens, step.new_tokens)),
            (Access("raw_keys", held), Access("raw_values", held)),
        ),
    )
