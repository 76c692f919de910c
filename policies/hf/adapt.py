"""Configs whose keys are not only named but arranged otherwise, as the common ones."""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def part(config: Config, key: str) -> Config:
    """An object inside a config; empty when it is missing. ValueError when it is anything else."""
    inner = config.get(key)
    if inner is None:
        return {}
    if not isinstance(inner, Mapping):
        raise ValueError(f"{key} must be an object of keys, not {str(inner)[:80]!r}")
    return inner


def chatglm(config: Config) -> Config:
    """GLM-4's own key names, as the common ones."""
    if config.get("add_bias_linear"):
        raise ValueError("add_bias_linear=true must be false: GLM-4 has biases in qkv only (add_qkv_bias)")
    grouped = config.get("multi_query_attention")
    return {
        **config,
        "num_hidden_layers": config.get("num_layers"),
        "num_key_value_heads": config.get("multi_query_group_num" if grouped else "num_attention_heads"),
        "head_dim": config.get("kv_channels"),
        "intermediate_size": config.get("ffn_hidden_size"),
        "vocab_size": config.get("padded_vocab_size"),
        "max_position_embeddings": config.get("seq_length"),
        "attention_bias": bool(config.get("add_qkv_bias")),
    }


def kimi_linear(config: Config) -> Config:
    """Kimi-Linear: what its linear layers are made of stands in an object of its own, counting layers from 1."""
    linear = part(config, "linear_attn_config")
    if not linear:
        return config
    full, layers = linear.get("full_attn_layers"), config.get("num_hidden_layers")
    kinds = {}
    if isinstance(full, list) and isinstance(layers, int) and 0 < layers <= 100_000:
        kinds["layer_types"] = ["full_attention" if i + 1 in full else "linear_attention" for i in range(layers)]
    return {
        **config,
        **kinds,
        "linear_head_dim": linear.get("head_dim"),
        "linear_num_heads": linear.get("num_heads"),
        "linear_conv_kernel_dim": linear.get("short_conv_kernel_size"),
        "use_full_rank_gate": linear.get("use_full_rank_gate"),
    }


def minimax_m3(config: Config) -> Config:
    """MiniMax-M3: which layers have an indexer, and its sizes, stand in an object of its own."""
    sparse = part(config, "sparse_attention_config")
    names = {
        "index_head_dim": "sparse_index_dim",
        "index_n_heads": "sparse_num_index_heads",
        "index_block_size": "sparse_block_size",
        "index_topk_blocks": "sparse_topk_blocks",
    }
    return {**config, **{key: sparse.get(name, config.get(key)) for key, name in names.items()}} | (
        {"indexed_layers": sparse["sparse_attention_freq"]} if "sparse_attention_freq" in sparse else {}
    )


def mpt(config: Config) -> Config:
    """MPT: an MLP of `expansion_ratio` times the hidden size, KV heads in an object of their own."""
    heads, width, ratio = config.get("n_heads"), config.get("d_model"), config.get("expansion_ratio")
    wide = {"intermediate_size": ratio * width} if isinstance(ratio, int) and isinstance(width, int) else {}
    return {**config, **wide, "num_key_value_heads": part(config, "attn_config").get("kv_n_heads", heads)}


def dbrx(config: Config) -> Config:
    """DBRX: attention and experts in objects of their own."""
    ffn = part(config, "ffn_config")
    return {
        **config,
        "num_key_value_heads": part(config, "attn_config").get("kv_n_heads"),
        "intermediate_size": ffn.get("ffn_hidden_size"),
        "num_experts": ffn.get("moe_num_experts"),
        "num_experts_per_tok": ffn.get("moe_top_k"),
    }


def falcon(config: Config) -> Config:
    """Falcon: `multi_query` means one KV head, unless the newer design says how many."""
    heads = config.get("num_attention_heads", config.get("n_head"))
    kv_heads = heads if config.get("multi_query") is False else 1
    if "n_head_kv" in config:  # as its first files, of RefinedWeb, say it
        config = {"new_decoder_architecture": True, **config}
    if config.get("new_decoder_architecture"):
        kv_heads = config.get("num_kv_heads", config.get("n_head_kv", heads))
    return {**config, "num_key_value_heads": kv_heads}


def multi_query(config: Config) -> Config:
    """GPT-BigCode: one KV head, unless `multi_query` is off."""
    return {**config, "num_key_value_heads": config.get("n_head") if config.get("multi_query") is False else 1}


def lfm2(config: Config) -> Config:
    """LFM2: the MLP's width is two thirds of the key's, rounded up, where the config says to adjust it."""
    width = config.get("block_ff_dim", config.get("intermediate_size"))
    if config.get("block_auto_adjust_ff_dim", True) and isinstance(width, int):
        width = int(config.get("block_ffn_dim_multiplier", 1.0) * (2 * width // 3))
        multiple = config.get("block_multiple_of", 256)
        width = multiple * -(-width // multiple)
    tied = config.get("tie_embedding", config.get("tie_word_embeddings", True))
    return {**config, "intermediate_size": width, "tie_word_embeddings": tied}


def step(config: Config) -> Config:
    """Step-3.5: sliding layers have heads of their own; a text lists the layers with experts."""
    other = part(config, "attention_other_setting")
    sliding = {
        "swa_num_attention_heads": config.get("num_sliding_attention_heads", other.get("num_attention_heads")),
        "swa_num_key_value_heads": other.get("num_attention_groups"),
        "swa_head_dim": other.get("head_dim"),
    }
    listed, layers = config.get("moe_layers_enum"), config.get("num_hidden_layers")
    sparse = {}
    if isinstance(listed, str | list) and isinstance(layers, int) and 0 < layers <= 100_000:
        chosen = {int(i) for i in (listed.split(",") if isinstance(listed, str) else listed)}
        sparse["mlp_layer_types"] = ["sparse" if i in chosen else "dense" for i in range(layers)]
    return {**config, **sliding, **sparse}


def gpt_neo(config: Config) -> Config:
    """GPT-Neo: `attention_types` repeats a pattern of global and local layers."""
    kinds = config.get("attention_layers")
    if kinds is None:
        repeated = config.get("attention_types", [[["global", "local"], 12]])
        kinds = [kind for pattern, times in repeated for _ in range(times) for kind in pattern]
    names = {"global": "full_attention", "local": "sliding_attention"}
    return {**config, "layer_types": [names.get(kind, kind) for kind in kinds]}


def qwen1(config: Config) -> Config:
    """Qwen (the first): an MLP of half the width that its key says, biases in qkv alone."""
    width = config.get("intermediate_size")
    return {**config, "intermediate_size": width // 2 if isinstance(width, int) else width}


def mimo(config: Config) -> Config:
    """MiMo-V2: sliding layers have twice the KV heads, unless the config says how many."""
    kv_heads = config.get("num_key_value_heads")
    doubled = 2 * kv_heads if isinstance(kv_heads, int) else None
    return {**config, "swa_num_key_value_heads": config.get("swa_num_key_value_heads", doubled)}
