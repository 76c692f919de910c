"""Layers of Zamba2 (arXiv:2411.15242): Mamba-2 throughout, and a few attention blocks that many layers share."""

from dataclasses import replace

from policies.hf.attention import heads_params
from policies.hf.family import Family, decided
from policies.hf.keys import Keys
from policies.hf.mixers import mamba2
from policies.hf.mlps import layer, mlp_params
from policies.hf.per_layer import per_layer
from policies.model import LayerShape

_PLAIN = ("mamba", "linear_attention")


def zamba2_layers(keys: Keys, family: Family) -> tuple[LayerShape, ...]:
    """A Mamba-2 layer each; hybrid ones attend as well, over the hidden state beside the embedding.

    The weights of a shared block count with every layer that uses it, as each reads them; see `zamba2_outside`.
    """
    hidden, rank = keys.number("hidden_size"), keys.number("adapter_rank")
    plain = layer({**mamba2(keys), "mlp_params": 0, "mlp_active_params": 0}, hidden)
    attention, mlp = _attention(keys, family), _mlp(keys, family)
    adapters = 3 * 2 * (2 * hidden) * rank if keys.flag("use_shared_attention_adapter", False) else 0
    mlp_adapter = rank * (hidden + 2 * _width(keys))
    hybrid = replace(
        plain,
        kind="full",
        heads=attention["heads"],
        kv_heads=attention["kv_heads"],
        head_dim=attention["head_dim"],
        v_head_dim=attention["v_head_dim"],
        qkv_params=plain.qkv_params + attention["qkv_params"] + 2 * hidden + adapters + hidden * hidden,
        out_params=plain.out_params + attention["out_params"],
        mlp_params=mlp + mlp_adapter,
        mlp_active_params=mlp + mlp_adapter,
    )
    return tuple(hybrid if kind == "hybrid" else plain for kind in _kinds(keys))


def zamba2_outside(keys: Keys) -> int:
    """Less than nothing: shared blocks that layers have counted again."""
    uses, family = _kinds(keys).count("hybrid"), Family()
    attention = _attention(keys, family)
    block = attention["qkv_params"] + attention["out_params"] + 2 * keys.number("hidden_size") + _mlp(keys, family)
    return -max(0, uses - keys.number("num_mem_blocks")) * block


def _attention(keys: Keys, family: Family) -> dict[str, int]:
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    if 2 * hidden % heads:
        raise keys.error("num_attention_heads", f"does not divide twice hidden_size={hidden}")
    dim = 2 * hidden // heads
    kv_heads = keys.number("num_key_value_heads", heads)
    return heads_params(keys, family, heads, kv_heads, (dim, dim), 2 * hidden)


def _mlp(keys: Keys, family: Family) -> int:
    hidden, width = keys.number("hidden_size"), _width(keys)
    bias = 2 * width + hidden if decided(keys, "mamba_proj_bias") else 0
    return mlp_params(hidden, width, family, False) + bias + hidden


def _width(keys: Keys) -> int:
    return keys.number("intermediate_size", 4 * keys.number("hidden_size"))


def _kinds(keys: Keys) -> list[str]:
    kinds = [str(kind) for kind in per_layer(keys, "layers_block_type")]
    if not kinds or any(kind not in (*_PLAIN, "hybrid") for kind in kinds):
        raise keys.error("layers_block_type", f"must name {' or '.join(_PLAIN)}, or hybrid, for each layer")
    return kinds
