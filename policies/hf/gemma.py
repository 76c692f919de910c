"""Layers of Gemma 3n and Gemma 4: upper ones read the cache of earlier ones, and each has an embedding of its own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from policies.hf.attention import head_dim_of, heads_params, window_of
from policies.hf.family import Experts, Family, decided
from policies.hf.keys import Keys
from policies.hf.mlps import dense_mlp, layer, mlp_params
from policies.hf.per_layer import number_at, per_layer
from policies.model import LayerShape

_NEXT_INPUTS = 3  # Gemma 4's norms around its experts, beside those of the dense MLP


def gemma3n_layers(keys: Keys, family: Family) -> tuple[LayerShape, ...]:
    """Gemma 3n: AltUp's parallel streams, LAuReL's low-rank path and per-layer inputs beside each layer."""
    hidden, streams = keys.number("hidden_size"), keys.number("altup_num_inputs")
    rank = keys.number("laurel_rank")
    altup = streams * streams + streams**3 + streams * hidden + 2 * hidden
    beside = altup + 2 * hidden * rank + hidden + _per_layer_input(keys)
    return _layers(keys, family, 5, lambda shape, _: _heavier(shape, beside))


def gemma4_layers(keys: Keys, family: Family) -> tuple[LayerShape, ...]:
    """Gemma 4: global layers with heads of their own, experts beside the dense MLP, a wider MLP where KV is shared."""
    per_input = _per_layer_input(keys)
    wide = keys.flag("use_double_wide_mlp", False)

    def finish(shape: LayerShape, shared: bool) -> LayerShape:
        if wide and shared:
            more = 3 * keys.number("hidden_size") * keys.number("intermediate_size")
            shape = replace(shape, mlp_params=shape.mlp_params + more, mlp_active_params=shape.mlp_active_params + more)
        if keys.flag("enable_moe_block", False):
            shape = _with_experts(keys, family, shape)
        return _heavier(shape, per_input)

    return _layers(keys, family, 6, finish)


def per_layer_embeddings(keys: Keys) -> int:
    """The table of per-layer inputs, its projection from the hidden state, and a norm."""
    width = keys.number("hidden_size_per_layer_input", 0, least=0)
    all_layers = width * keys.number("num_hidden_layers")
    vocab = keys.number("vocab_size_per_layer_input", keys.number("vocab_size"))
    return all_layers * (vocab + keys.number("hidden_size")) + width


def gemma3n_outside(keys: Keys) -> int:
    """Per-layer embeddings, and AltUp's projections into and out of all streams but the first."""
    return per_layer_embeddings(keys) + 2 * (keys.number("altup_num_inputs") - 1) * keys.number("hidden_size") ** 2


def _layers(
    keys: Keys, family: Family, every: int, finish: Callable[[LayerShape, bool], LayerShape]
) -> tuple[LayerShape, ...]:
    hidden, count = keys.number("hidden_size"), keys.number("num_hidden_layers")
    kinds = _kinds(keys, every)
    own = count - keys.number("num_kv_shared_layers", 0, least=0)
    if own < 1:
        raise keys.error("num_kv_shared_layers", f"leaves none of {count} layers with keys of its own")
    shapes = []
    for index, kind in enumerate(kinds):
        shared = index >= own
        parts = _attention(keys, family, kind, index, shared=shared)
        if shared and kind not in kinds[:own]:
            raise keys.error("num_kv_shared_layers", f"leaves layer {index} no {kind} layer to share with")
        source = own - 1 - kinds[:own][::-1].index(kind) if shared else None
        width = number_at(keys, "intermediate_size", index)
        shape = layer({**parts, "share_kv_with": source, **dense_mlp(keys, family, width)}, 4 * hidden)
        shapes.append(finish(shape, shared))
    return tuple(shapes)


def _kinds(keys: Keys, every: int) -> list[str]:
    named = per_layer(keys, "layer_types")
    if not named:
        named = [
            "sliding_attention" if (index + 1) % every else "full_attention"
            for index in range(keys.number("num_hidden_layers"))
        ]
    known = {"sliding_attention": "sliding", "full_attention": "full"}
    if unknown := [name for name in named if str(name) not in known]:
        raise keys.error("layer_types", f"has {str(unknown[0])[:80]!r}; known: {', '.join(known)}")
    return [known[str(name)] for name in named]


def _attention(keys: Keys, family: Family, kind: str, index: int, *, shared: bool) -> dict[str, Any]:
    heads = keys.number("num_attention_heads")
    kv_heads, dim = number_at(keys, "num_key_value_heads", index, heads), head_dim_of(keys, heads, index)
    equal = kind == "full" and keys.flag("attention_k_eq_v", False)
    if kind == "full" and "per_layer_config" not in keys:
        dim = keys.number("global_head_dim", dim)
        kv_heads = keys.number("num_global_key_value_heads", kv_heads) if equal else kv_heads
    parts = heads_params(keys, family, heads, kv_heads, (dim, dim))
    inputs = keys.number("hidden_size") + (1 if decided(keys, family.qkv_bias) else 0)
    one = kv_heads * dim * inputs  # a projection to keys or to values
    parts["qkv_params"] -= 2 * one + dim if shared else one if equal else 0
    window = window_of(keys, family) if kind == "sliding" else 0
    return {**parts, "kind": "sliding" if window else "full", "window_tokens": window}


def _with_experts(keys: Keys, family: Family, shape: LayerShape) -> LayerShape:
    hidden, count = keys.number("hidden_size"), keys.number("num_experts")
    per_token = keys.number("top_k_experts")
    expert = mlp_params(hidden, keys.number(Experts().width), family, False)
    rest = count * hidden + hidden + count + _NEXT_INPUTS * hidden
    return replace(
        shape,
        mlp_params=shape.mlp_params + rest + count * expert,
        mlp_active_params=shape.mlp_active_params + rest + per_token * expert,
        experts=count,
        experts_per_token=per_token,
        expert_params=expert,
    )


def _per_layer_input(keys: Keys) -> int:
    width, hidden = keys.number("hidden_size_per_layer_input", 0, least=0), keys.number("hidden_size")
    return 2 * width * hidden + (hidden if width else 0)


def _heavier(shape: LayerShape, params: int) -> LayerShape:
    return replace(shape, mlp_params=shape.mlp_params + params, mlp_active_params=shape.mlp_active_params + params)
