"""Layers of DeepSeek-V4: one vector that is key and value, kept for a window and, compressed, for all before it."""

from typing import Any

from policies.hf.attention import window_of
from policies.hf.family import Experts, Family
from policies.hf.keys import Keys
from policies.hf.mlps import layer, sparse_mlp
from policies.hf.per_layer import number_at, per_layer
from policies.model import LayerShape
from policies.shown import shown

_EXPERTS = Experts(
    count="n_routed_experts", shared_count="n_shared_experts", correction_bias=True, shared_bias="mlp_bias"
)
_SPARSE, _HEAVY, _WINDOW = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
_DEFAULT_RATES = {_SPARSE: 4, _HEAVY: 128}


def deepseek_v4_layers(keys: Keys, family: Family) -> tuple[LayerShape, ...]:
    """A window alone, a window and one row for each 4 tokens that an indexer chooses from, or one for each 128."""
    hidden, streams = keys.number("hidden_size"), keys.number("hc_mult")
    mixes = streams * (streams + 2)  # mHC: what each stream gives, takes and keeps
    connections = 2 * (mixes * streams * hidden + mixes + 3)
    layers = []
    for index, rate in enumerate(_rates(keys)):
        first = _attention(keys, family, rate)
        first["qkv_params"] += connections
        second = sparse_mlp(keys, family, _EXPERTS, index)
        if _hashed(keys, index):  # experts by a table of token ids, so no bias that balances them
            for part in ("mlp_params", "mlp_active_params"):
                second[part] -= keys.number("n_routed_experts")
        layers.append(layer({**first, **second}, 2 * hidden))
    return tuple(layers)


def deepseek_v4_outside(keys: Keys) -> int:
    """What joins the streams before the head."""
    streams = keys.number("hc_mult")
    return streams * streams * keys.number("hidden_size") + streams + 1


def _attention(keys: Keys, family: Family, rate: int) -> dict[str, Any]:
    hidden, heads, dim = keys.number("hidden_size"), keys.number("num_attention_heads"), keys.number("head_dim")
    q_rank, groups, out_rank = keys.number("q_lora_rank"), keys.number("o_groups"), keys.number("o_lora_rank")
    whole = hidden * q_rank + q_rank + hidden * dim + dim
    parts = {
        "kind": "compressed" if rate else "sliding",
        "heads": heads,
        "kv_heads": 1,
        "head_dim": dim,
        "v_head_dim": dim,
        "window_tokens": window_of(keys, family),
        "latent_dim": dim,
        "out_params": heads * dim * out_rank + groups * out_rank * hidden,
    }
    if not parts["window_tokens"]:
        raise keys.error("sliding_window", "must be less than max_position_embeddings")
    if rate:
        parts["block_tokens"] = rate
        whole += _compressor(hidden, dim, rate, overlapping=_has_indexer(keys, rate))
    if rate and _has_indexer(keys, rate):
        index_heads, index_dim = keys.number("index_n_heads"), keys.number("index_head_dim")
        whole += _compressor(hidden, index_dim, rate, overlapping=True)
        whole += q_rank * index_heads * index_dim + hidden * index_heads
        parts |= {"index_dim": index_dim, "index_heads": index_heads, "index_topk": keys.number("index_topk")}
    return {**parts, "qkv_params": whole + q_rank * heads * dim + heads, "whole_params": whole}


def _compressor(hidden: int, dim: int, rate: int, *, overlapping: bool) -> int:
    """Projections to what is pooled and to its weights, a bias for each position in a block, and a norm."""
    wide = 2 * dim if overlapping else dim
    return 2 * hidden * wide + rate * wide + dim


def _has_indexer(keys: Keys, rate: int) -> bool:
    return rate != _rate_of(keys, _HEAVY)


def _rate_of(keys: Keys, kind: str) -> int:
    given = keys.value("compress_rates")
    rate = given.get(kind, _DEFAULT_RATES[kind]) if isinstance(given, dict) else _DEFAULT_RATES[kind]
    if not isinstance(rate, int) or isinstance(rate, bool) or rate < 2:
        raise keys.error("compress_rates", "must hold whole numbers of at least 2")
    return rate


def _rates(keys: Keys) -> list[int]:
    """Tokens that one compressed row of each layer stands for; 0 for a window alone."""
    kinds = per_layer(keys, "layer_types")
    if kinds:
        if unknown := [kind for kind in kinds if kind not in (_SPARSE, _HEAVY, _WINDOW)]:
            raise keys.error("layer_types", f"has {shown(unknown[0])}; known: {_WINDOW}, {_SPARSE}, {_HEAVY}")
        return [0 if kind == _WINDOW else _rate_of(keys, str(kind)) for kind in kinds]
    if not keys.has_list("compress_ratios"):
        raise keys.error("layer_types", "is needed, or compress_ratios: DeepSeek-V4 names the kind of each layer")
    rates = [number_at(keys, "compress_ratios", index, least=0) for index in range(keys.number("num_hidden_layers"))]
    known = (0, _rate_of(keys, _SPARSE), _rate_of(keys, _HEAVY))
    if unknown_rates := [rate for rate in rates if rate not in known]:
        raise keys.error("compress_ratios", f"has {unknown_rates[0]}; known: {', '.join(map(str, known))}")
    return rates


def _hashed(keys: Keys, index: int) -> bool:
    kinds = per_layer(keys, "mlp_layer_types")
    return kinds[index] == "hash_moe" if kinds else index < keys.number("num_hash_layers", 3, least=0)
