"""From a Hugging Face `config.json` to a ModelShape: which layers an architecture has, and how each is made."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from policies.hf.keys import Keys, check_kinds
from policies.hf.layers import LINEAR, Experts, Family, attention, dense_mlp, layer, mla, sparse_mlp
from policies.hf.nemotron import NEMOTRON_H, common_keys, nemotron_layers
from policies.hf.quantised import as_stored
from policies.model import LayerShape, ModelShape
from policies.shown import shown

_QWEN_EXPERTS = Experts(count="num_experts", width="moe_intermediate_size")
_QWEN_SHARED = replace(_QWEN_EXPERTS, shared_width="shared_expert_intermediate_size", shared_gate=True)
_DEEPSEEK_EXPERTS = Experts(
    count="n_routed_experts", width="moe_intermediate_size", shared_count="n_shared_experts", correction_bias=True
)
_LOCAL_EXPERTS = Experts(count="num_local_experts", width="intermediate_size")

_LLAMA = Family(qkv_bias=None, out_bias=None)
_QWEN3 = Family(qkv_bias=None, out_bias=None, qk_norm="head")

# Defaults are those of the configuration classes in transformers; only keys that published configs leave out.
_GEMMA3 = Family(
    norms=4,
    qk_norm="head",
    tied=True,
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
    },
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": Family(),
        "mixtral": Family(experts=_LOCAL_EXPERTS),
        "qwen2": Family(qkv_bias=True),
        "qwen2_moe": Family(qkv_bias=True, experts=_QWEN_SHARED),
        "qwen3": _QWEN3,
        "qwen3_moe": replace(_QWEN3, experts=_QWEN_EXPERTS),
        "qwen3_next": Family(qk_norm="head", gated=True, experts=_QWEN_SHARED, linear="gated_delta_net"),
        "phi3": Family(),
        "gemma2": Family(norms=4, tied=True),
        "gemma3_text": _GEMMA3,
        "gpt_oss": Family(qkv_bias=None, out_bias=None, sinks=True, experts=replace(_LOCAL_EXPERTS, biased=True)),
        "deepseek_v2": Family(kv="mla", experts=replace(_DEEPSEEK_EXPERTS, correction_bias=False)),
        "deepseek_v3": Family(kv="mla", experts=_DEEPSEEK_EXPERTS),
        "glm": Family(qkv_bias=None),
        "glm4": Family(qkv_bias=None, norms=4),
        "chatglm": Family(qkv_bias=None),
        "cohere": Family(norms=1, qk_norm="heads", tied=True),
        "cohere2": Family(norms=1, tied=True, defaults={"sliding_window_pattern": 4}),
        "jamba": Family(linear="mamba", experts=replace(_LOCAL_EXPERTS, count="num_experts")),
        "bamba": Family(qkv_bias=None, out_bias=None, linear="mamba2"),
        "granitemoehybrid": Family(
            qkv_bias=None,
            out_bias=None,
            linear="mamba2",
            experts=replace(_LOCAL_EXPERTS, shared_width="shared_intermediate_size"),
        ),
        "gpt_neox": Family(
            norms=4, last_norms=2, qkv_bias=True, out_bias=True, gated_mlp=False, mlp_bias=True
        ),  # LayerNorm has a bias
        "nemotron_h": NEMOTRON_H,
        "llama4_text": replace(_LLAMA, experts=replace(_LOCAL_EXPERTS, always_shared=1)),
    }
)

SERVED_IN_HALF = "the checkpoint is in fp32, and is taken to be served in bf16; --weight-dtype fp32 leaves it as it is"

# An unknown architecture is read as a Llama when all of these are there and nothing hints at another design.
_LLAMA_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_FOREIGN = ("expert", "mamba", "ssm", "cross_attention", "layer_type", "pattern", "window", "lora_rank", "chunk")

_KIND_OF_LAYER_TYPE = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "linear",
    "mamba": "linear",
    "block_attention": "block",  # these two are of no published config: Block Transformer, CCA
    "core_attention": "core",
}


def read(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of the language model that `config` describes; vision and audio towers are left out.

    Weights, cached keys and values have the config's dtype, bf16 when it names none or fp32; what a quantised
    checkpoint converts has the types of its scheme. Extra layers for multi-token prediction are not counted.

    Raises ValueError for a missing key, a value out of range, or an architecture that is not known.
    """
    check_kinds(config, name)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        check_kinds(text, name)
        outer = {key: value for key, value in config.items() if key not in ("text_config", "model_type")}
        config = {"model_type": config.get("model_type"), **outer, **text}
    model_type = {"gemma3": "gemma3_text", "llama4": "llama4_text"}.get(config.get("model_type", ""))
    model_type = model_type or config.get("model_type") or ""
    if model_type == "chatglm":
        config = _from_chatglm(config)
    elif model_type == "nemotron_h":
        config = common_keys(config)
    family = FAMILIES.get(model_type) or _unknown_family(config, model_type, name)
    keys = Keys(config, name, family.defaults)
    hidden, vocab = keys.number("hidden_size"), keys.number("vocab_size")
    if model_type == "nemotron_h":
        layers = nemotron_layers(keys)
    else:
        kinds = _layer_kinds(keys, model_type)
        layers = tuple(_layer(keys, family, model_type, index, kind) for index, kind in enumerate(kinds))
    tied = keys.flag("tie_word_embeddings", family.tied)
    in_layers = sum(x.qkv_params + x.out_params + x.mlp_params for x in layers)
    dtype, notes = keys.dtype(), tuple[str, ...]()
    if dtype == "fp32":
        dtype, notes = "bf16", (SERVED_IN_HALF,)
    shape = ModelShape(
        name=name,
        hidden_dim=hidden,
        vocab_size=vocab,
        max_positions=keys.number("max_position_embeddings"),
        layers=layers,
        embedding_params=vocab * hidden,
        head_params=vocab * hidden,
        params=in_layers + family.last_norms * hidden + vocab * hidden * (1 if tied else 2),
        dtype=dtype,
        kv_dtype=dtype,
        weight_dtype=dtype,
        notes=notes,
    )
    return as_stored(shape, keys, model_type, gated_mlp=family.gated_mlp)


def _unknown_family(config: Mapping[str, Any], model_type: str, name: str) -> Family:
    missing = [key for key in _LLAMA_KEYS if config.get(key) is None]
    foreign = sorted(key for key, value in config.items() if value and any(part in key for part in _FOREIGN))
    if missing or foreign:
        reason = f"it has no {', '.join(missing)}" if missing else f"it has {', '.join(foreign)}"
        raise ValueError(
            f"config of {shown(name)}: unknown model_type {shown(model_type)}, and it is no plain Llama: {reason}; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    return _LLAMA


def _from_chatglm(config: Mapping[str, Any]) -> dict[str, Any]:
    """GLM-4's own key names, as the common ones."""
    if config.get("add_bias_linear"):
        raise ValueError("add_bias_linear=true is not supported: GLM-4 has biases in qkv only (add_qkv_bias)")
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


def _layer_kinds(keys: Keys, model_type: str) -> list[str]:
    """`full`, `sliding` or `linear` for each layer."""
    layers = keys.number("num_hidden_layers")
    named = keys.names("layer_types")
    if named:
        if len(named) != layers:
            raise keys.error("num_hidden_layers", f"differs from the {len(named)} entries of layer_types")
        for layer_type in named:
            if layer_type not in _KIND_OF_LAYER_TYPE:
                known = ", ".join(_KIND_OF_LAYER_TYPE)
                raise keys.error("layer_types", f"has {shown(layer_type)}; known: {known}")
        return [_KIND_OF_LAYER_TYPE[layer_type] for layer_type in named]
    return [_kind_by_rule(keys, model_type, index) for index in range(layers)]


def _kind_by_rule(keys: Keys, model_type: str, index: int) -> str:
    """The kind of a layer whose config has no `layer_types`: each architecture has its rule."""
    match model_type:
        case "gemma3_text" | "cohere2":
            full = (index + 1) % keys.number("sliding_window_pattern") == 0
        case "gemma2" | "gpt_oss":
            full = index % 2 == 1
        case "llama4_text":
            marks = keys.sequence("no_rope_layers")  # 1: rotary, in chunks; 0: no positions, over everything
            full = not marks[index] if marks else (index + 1) % keys.number("no_rope_layer_interval", 4) == 0
        case "qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe":
            full = not keys.flag("use_sliding_window", False) or index < keys.number("max_window_layers", least=0)
        case "qwen3_next":
            return "full" if (index + 1) % keys.number("full_attention_interval", 4) == 0 else "linear"
        case "jamba":
            offset = keys.number("attn_layer_offset", least=0)
            return "full" if index % keys.number("attn_layer_period") == offset else "linear"
        case "bamba":
            return "full" if index in keys.sequence("attn_layer_indices") else "linear"
        case "granitemoehybrid":
            raise keys.error("layer_types", "is needed: Granite names the kind of each layer")
        case _:
            full = "sliding_window" not in keys
    return "full" if full else "sliding"


def _layer(keys: Keys, family: Family, model_type: str, index: int, kind: str) -> LayerShape:
    if kind == "linear":
        if not family.linear:
            raise keys.error("layer_types", f"has linear layers, which {shown(model_type)} models do not have")
        first = LINEAR[family.linear](keys)
    elif family.kv == "mla":
        first = mla(keys)
    else:
        window = 0
        if kind in ("sliding", "core"):
            window = keys.number("attention_chunk_size" if model_type == "llama4_text" else "sliding_window")
        # A window that holds every position is no window (Phi-3-mini-128k has one of 262,144).
        first = attention(keys, family, window if window < keys.number("max_position_embeddings") else 0)
        if kind in ("block", "core"):
            first |= {"kind": kind, "block_tokens": keys.number("block_length", least=2)}
    if family.experts and _is_sparse(keys, model_type, index):
        second = sparse_mlp(keys, family, family.experts)
    else:
        second = dense_mlp(keys, family, keys.number(_DENSE_WIDTH.get(model_type, "intermediate_size")))
    return layer({**first, **second}, family.norms * keys.number("hidden_size"))


_DENSE_WIDTH = {"llama4_text": "intermediate_size_mlp", "granitemoehybrid": "shared_intermediate_size"}


def _is_sparse(keys: Keys, model_type: str, index: int) -> bool:
    """Whether layer `index` of a mixture of experts is one, not a dense layer."""
    match model_type:
        case "qwen2_moe" | "qwen3_moe" | "qwen3_next":
            every = (index + 1) % keys.number("decoder_sparse_step", 1) == 0
            return every and index not in keys.sequence("mlp_only_layers")
        case "deepseek_v2" | "deepseek_v3":
            first = keys.number("first_k_dense_replace", least=0)
            return index >= first and index % keys.number("moe_layer_freq", 1) == 0
        case "jamba":
            offset = keys.number("expert_layer_offset", least=0)
            return keys.number("num_experts") > 1 and index % keys.number("expert_layer_period") == offset
        case "granitemoehybrid":
            return keys.number("num_local_experts", least=0) > 0
        case "llama4_text":
            chosen = keys.sequence("moe_layers")
            return index in chosen if chosen else (index + 1) % keys.number("interleave_moe_layer_step", 1) == 0
        case _:
            return True
