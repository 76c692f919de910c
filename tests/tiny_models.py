"""Tiny random models of every family that Transformers builds as a causal or vision-language model.

A config is the family's default scaled down: sizes by the names that configs use, kinds of layers in turn, and for
some families what else must agree.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LAYERS, VOCABULARY, MOST_PARAMS = 2, 101, 40_000_000
CAUSAL = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION = {
    family: name
    for family, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    if family not in CAUSAL or CAUSAL[family] != name
}

_SIZES: tuple[tuple[int | None, tuple[str, ...]], ...] = (
    (VOCABULARY, ("vocab_size", "vocab_size_per_layer_input")),
    (
        64,
        (
            *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"),
            *("dim_model", "out_hidden_size", "mamba_d_ssm"),
        ),
    ),
    (
        96,
        (
            *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp", "decoder_ffn_dim"),
            *("encoder_ffn_dim", "d_ff", "dff", "dim_ff", "shared_intermediate_size", "block_ff_dim"),
            "dense_intermediate_size",
        ),
    ),
    (
        32,
        (
            *("moe_intermediate_size", "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
            *("expert_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size"),
        ),
    ),
    (LAYERS, ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")),
    (
        4,
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
            *("linear_num_value_heads", "mamba_dt_rank"),
        ),
    ),
    (
        2,
        (
            *(
                "num_key_value_heads",
                "num_kv_heads",
                "num_experts_per_tok",
                "num_experts_per_token",
                "moe_k",
                "moe_topk",
            ),
            *("moe_top_k", "top_k_experts", "linear_num_key_heads", "n_mamba_heads"),
        ),
    ),
    (
        1,
        (
            *("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts", "num_shared_experts"),
            *("num_shared_expert", "num_expert_groups", "first_k_dense_replace", "num_dense_layers"),
            *("moe_layer_start_index", "mamba_n_groups", "n_groups", "bos_token_id"),
        ),
    ),
    (
        16,
        (
            *("head_dim", "kv_channels", "kv_lora_rank", "q_lora_rank", "v_head_dim", "linear_key_head_dim"),
            *("linear_value_head_dim", "mamba_d_head", "mamba_head_dim"),
        ),
    ),
    (
        8,
        (
            *("sliding_window", "attention_window", "local_attention", "window_size", "attention_chunk_size"),
            *("sliding_window_size", "qk_rope_head_dim", "qk_nope_head_dim", "hidden_size_per_layer_input"),
            *("laurel_rank", "mamba_n_heads", "mamba_d_state", "mamba_chunk_size", "mamba_num_heads", "ssm_state_size"),
        ),
    ),
    (512, ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions")),
    (0, ("pad_token_id", "num_kv_shared_layers")),
    (None, ("eos_token_id",)),
)
SMALL = {name: size for size, names in _SIZES for name in names}

_MAMBA = {"layer_types": ["mamba", "attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_NO_WINDOW = {"sliding_window": None}
_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_THREE_AXES = {"text_config": {"mrope_section": [2, 3, 3]}}
_SHARED = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,  # the last full layer and the last window attend to the keys of those before
}
OWN: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("mistral", "mixtral", "phi3", "phimoe", "starcoder2", "ministral3"), _NO_WINDOW),
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "youtu"), _MLA),
    **dict.fromkeys(("glm4_moe_lite", "kimi_linear", "longcat_flash", "minicpm3"), _MLA),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), _SHARED),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm4v", "glm46v", "glmga", "glm_ocr"), _THREE_AXES),
    "glm4v_moe": {"text_config": {"mrope_section": [1, 1, 2]}},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "exaone_moe": {"mlp_layer_types": ["dense", "sparse"]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": _MAMBA,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "kimi_k25": {"text_config": _MLA},
    "lfm2": _CONV,
    "lfm2_moe": _CONV,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimo_v2_flash": {"v_head_dim": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "roc_bert": {
        "shape_vocab_size": 50,
        "pronunciation_vocab_size": 50,
        "shape_embed_dim": 16,
        "pronunciation_embed_dim": 16,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlm": {"n_words": VOCABULARY, "emb_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **own: Any) -> Any:
    """The default config of a family, scaled down; `own` wins."""
    return _scaled(CONFIG_MAPPING[family], {**OWN.get(family, {}), **own})


def tiny_model(family: str, **own: Any) -> Any:
    """A random fp32 model of a family for evaluation, the same at every call.

    Raises ValueError for one of more than `MOST_PARAMS` parameters, and whatever Transformers raises for its config.
    """
    made = getattr(transformers, {**VISION, **CAUSAL}[family])
    config = tiny_config(family, **own)
    text = config.get_text_config()
    config = text if isinstance(text, made.config_class) else config
    with torch.device("meta"):
        params = sum(weight.numel() for weight in made(config).parameters())
    if params > MOST_PARAMS:
        raise ValueError(f"{family} has {params} parameters when scaled down; scale down more of its config")
    torch.manual_seed(1)
    return made(config).eval().float()


def _scaled(kind: type, own: Mapping[str, Any]) -> Any:
    base = kind()
    known, own = vars(base), dict(own)
    parts = [name for name in getattr(base, "sub_configs", {}) if known.get(name)]
    given: dict[str, Any] = {name: SMALL[name] for name in known if name in SMALL}
    given |= {name: _scaled(type(known[name]), own.pop(name, {})) for name in parts}
    if types := known.get("layer_types"):
        kinds = list(dict.fromkeys(types))
        given["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    if "mrope_section" in own:
        given["rope_parameters"] = {**known["rope_parameters"], "mrope_section": own.pop("mrope_section")}
    given |= {name: True for name in ("is_decoder", "use_cache") if name in known}
    return kind(**{**given, **own})
