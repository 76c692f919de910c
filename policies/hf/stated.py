"""Layers of an architecture that the table lacks: keys and values as its config says, weights as the user states."""

from typing import Any

from policies.hf.attention import attention, mla
from policies.hf.family import Experts, Family
from policies.hf.keys import Keys
from policies.hf.mlps import layer
from policies.hf.per_layer import per_layer
from policies.hf.rules import KIND_OF_LAYER_TYPE
from policies.model import LayerShape
from policies.shown import shown

STATED = Family(aliases={"kv_channels": "head_dim", "attention_head_dim": "head_dim", "d_kv": "head_dim"})

# Keys of designs that cache something else than keys and values of every token, or a latent.
_FOREIGN = ("mamba", "ssm", "linear_", "conv", "recurrent", "compress", "kv_shared", "share_kv", "lru_", "rwkv")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def stated_layers(keys: Keys, params: int) -> tuple[LayerShape, ...]:
    """Layers whose attention has the sizes of the config, and whose MLPs share what is left of `params`.

    Raises ValueError where the config hints at a cache of another design, and for `params` that attention and
    embeddings exceed.
    """
    if foreign := [key for key in keys.given() if any(part in key for part in _FOREIGN) and keys.value(key)]:
        raise keys.error(foreign[0], "tells of a cache that its keys do not describe; --params cannot help")
    first = [_attention(keys, index, kind) for index, kind in enumerate(_kinds(keys))]
    matrices = 1 if keys.flag("tie_word_embeddings", False) else 2
    outside = matrices * keys.number("vocab_size") * keys.number("hidden_size")
    left = params - outside - sum(parts["qkv_params"] + parts["out_params"] for parts in first)
    if left < 0:
        raise ValueError(
            f"--params {params:,} is {-left:,} less than attention and embeddings weigh; state all weights"
        )
    shares = [left // len(first)] * len(first)
    shares[0] += left - sum(shares)
    return tuple(layer({**parts, **_mlp(keys, share)}, 0) for parts, share in zip(first, shares, strict=True))


def _kinds(keys: Keys) -> list[str]:
    kinds = per_layer(keys, "layer_types")
    for kind in kinds:
        if not isinstance(kind, str) or KIND_OF_LAYER_TYPE.get(kind) not in ("full", "sliding"):
            raise keys.error("layer_types", f"has {shown(kind)}, whose cache its keys do not describe")
    if kinds:
        return [KIND_OF_LAYER_TYPE[str(kind)] for kind in kinds]
    if "sliding_window" in keys and keys.value("use_sliding_window") is not False:
        raise keys.error("sliding_window", "is of layers that nothing names: add layer_types, or set it to null")
    return ["full"] * keys.number("num_hidden_layers")


def _attention(keys: Keys, index: int, kind: str) -> dict[str, Any]:
    if "kv_lora_rank" in keys:
        return mla(keys, Family(attention="mla", index="index_head_dim" in keys), index)
    return attention(keys, Family(), kind, index)


def _mlp(keys: Keys, params: int) -> dict[str, Any]:
    """One layer's share of the weights, experts among them where the config has some."""
    count_key = next((key for key in _COUNTS if key in keys and not keys.has_list(key)), None)
    if count_key is None or keys.number(count_key, least=0) < 2:
        return {"mlp_params": params, "mlp_active_params": params}
    width = Experts().width if Experts().width in keys else "intermediate_size"
    count, per_token = keys.number(count_key), keys.number("num_experts_per_tok")
    expert = min(3 * keys.number("hidden_size") * keys.number(width), params // count)
    return {
        "mlp_params": params,
        "mlp_active_params": params - (count - per_token) * expert,
        "experts": count,
        "experts_per_token": per_token,
        "expert_params": expert,
    }
