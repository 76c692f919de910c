"""Weights and cached elements of attention over keys and values, or over a latent, from the keys of a config."""

from typing import Any

from policies.hf.family import Family, decided
from policies.hf.keys import Keys
from policies.hf.per_layer import number_at


def attention(keys: Keys, family: Family, kind: str, index: int) -> dict[str, Any]:
    """Softmax attention over KV heads: `full`, `sliding`, or one whose cached rows stand for several tokens."""
    sliding = kind == "sliding"
    heads = _of_layer(keys, "num_attention_heads", index, sliding)
    kv_heads = _of_layer(keys, "num_key_value_heads", index, sliding, heads)
    head_dim = head_dim_of(keys, heads, index, sliding)
    v_head_dim = _of_layer(keys, "v_head_dim", index, sliding, head_dim) if "v_head_dim" in keys else head_dim
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"does not divide num_attention_heads={heads}")
    parts = heads_params(keys, family, heads, kv_heads, (head_dim, v_head_dim))
    sinks = family.sinks == "all" or (family.sinks == "sliding" and sliding)
    qkv = parts["qkv_params"] + (heads if sinks else 0)
    window = window_of(keys, family) if kind in ("sliding", "core") else 0
    if sliding and not window:
        kind = "full"
    rest = {"block_tokens": keys.number("block_length", least=2)} if kind in ("block", "core") else {}
    return {**parts, "kind": kind, "qkv_params": qkv, "window_tokens": window, **rest}


def window_of(keys: Keys, family: Family) -> int:
    """Tokens of the window of a sliding layer; 0 where it holds every position, so is none (Phi-3-mini-128k)."""
    window = keys.number(family.window)
    return window if window < keys.number("max_position_embeddings", window + 1) else 0


def heads_params(
    keys: Keys, family: Family, heads: int, kv_heads: int, dims: tuple[int, int], read_dim: int = 0
) -> dict[str, Any]:
    """Projections, biases, norms and gates of attention with these heads; `read_dim` where it reads a wider input."""
    hidden, (head_dim, v_head_dim) = keys.number("hidden_size"), dims
    q_dim, k_dim, v_dim, out_dim = heads * head_dim, kv_heads * head_dim, kv_heads * v_head_dim, heads * v_head_dim
    qkv_dim = q_dim + k_dim + v_dim
    qkv = (read_dim or hidden) * qkv_dim + (qkv_dim if decided(keys, family.qkv_bias) else 0)
    out = out_dim * hidden + (hidden if decided(keys, family.out_bias) else 0)
    if family.qk_norm and decided(keys, family.qk_norm_if):
        normed = 2 * head_dim if family.qk_norm == "head" else q_dim + k_dim
        qkv += normed * (2 if family.qk_norm_bias else 1)
    if family.gate and decided(keys, family.gate_if):
        gate_dim = out_dim if family.gate == "wide" else heads
        qkv += hidden * gate_dim + (gate_dim if family.gate_biased and decided(keys, family.qkv_bias) else 0)
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "qkv_params": qkv,
        "out_params": out,
    }


def head_dim_of(keys: Keys, heads: int, index: int = 0, sliding: bool = False) -> int:
    """Dimensions of a query and key head: as the config says, or an equal share of the hidden size."""
    if "head_dim" in keys or "per_layer_config" in keys:
        return _of_layer(keys, "head_dim", index, sliding)
    hidden = keys.number("hidden_size")
    if hidden % heads:
        raise keys.error("hidden_size", f"is not a multiple of num_attention_heads={heads}; give head_dim")
    return hidden // heads


def mla(keys: Keys, family: Family, index: int) -> dict[str, Any]:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): a latent and one rotary key per token are cached."""
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    latent, rope = keys.number("kv_lora_rank"), keys.number("qk_rope_head_dim")
    nope, v_dim = keys.number("qk_nope_head_dim"), keys.number("v_head_dim")
    q_dim = heads * (nope + rope)
    down = hidden * (latent + rope) + latent
    biased = decided(keys, family.qkv_bias)
    if "q_lora_rank" in keys:
        q_rank = keys.number("q_lora_rank")
        down += hidden * q_rank + q_rank + (q_rank + latent + rope if biased else 0)
        up = q_rank * q_dim
    else:
        up = hidden * q_dim
        down += latent + rope if biased else 0
    up += latent * heads * (nope + v_dim)
    if family.gate and decided(keys, family.gate_if):
        up += hidden * heads * v_dim
    parts = {
        "kind": "mla",
        "heads": heads,
        "kv_heads": 1,
        "head_dim": nope + rope,
        "v_head_dim": v_dim,
        "latent_dim": latent + rope,
        "out_params": heads * v_dim * hidden + (hidden if decided(keys, family.out_bias) else 0),
    }
    if family.index and _has_indexer(keys, index):
        indexer = _indexer(keys)
        down += indexer.pop("params")
        parts |= indexer
    return {**parts, "qkv_params": down + up, "whole_params": down}


def _indexer(keys: Keys) -> dict[str, int]:
    """DeepSeek-V3.2's lightning indexer: its heads' queries from the query latent, one normed key a token."""
    hidden, heads, dim = keys.number("hidden_size"), keys.number("index_n_heads"), keys.number("index_head_dim")
    params = keys.number("q_lora_rank") * heads * dim + hidden * (dim + heads) + 2 * dim
    return {"params": params, "index_dim": dim, "index_heads": heads, "index_topk": keys.number("index_topk")}


def _has_indexer(keys: Keys, index: int) -> bool:
    """Whether a layer has an indexer of its own: GLM-5.2 lets some layers use the choice of the one before."""
    types = keys.sequence("indexer_types")
    if not types and "index_topk_pattern" in keys:
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in keys.text("index_topk_pattern")]
    if types:
        if index >= len(types) or types[index] not in ("full", "shared"):
            raise keys.error("indexer_types", "must name full or shared for each layer")
        return bool(types[index] == "full")
    every, offset = keys.number("index_topk_freq", 1), keys.number("index_skip_topk_offset", 2, least=0)
    return max(index - offset + 1, 0) % every == 0


def _of_layer(keys: Keys, key: str, index: int, sliding: bool, default: int | None = None) -> int:
    """A number of one layer: of sliding layers where the config tells them apart, of each layer where it lists them."""
    if sliding and "swa_" + key in keys:
        return keys.number("swa_" + key)
    if f"{key}_per_layer" in keys:
        return number_at(keys, f"{key}_per_layer", index)
    return number_at(keys, key, index, default)
