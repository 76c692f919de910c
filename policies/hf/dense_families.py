"""Architectures without experts: attention and an MLP in every layer."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from policies.hf import adapt, rules
from policies.hf.family import Family, decided
from policies.hf.keys import Keys

LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
BIASED = replace(LLAMA, mlp_bias=False)
QWEN2 = Family(qkv_bias=True, kinds=rules.qwen)
QWEN3 = replace(BIASED, qk_norm="head", kinds=rules.qwen)
TWO_MATRICES = replace(LLAMA, gated_mlp=False)

_OLD_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}


def learned_positions(keys: Keys) -> int:
    """A learned vector for each position."""
    return keys.number("max_position_embeddings") * keys.number("hidden_size")


def _opt_outside(keys: Keys) -> int:
    """Two positions more than there are, and projections where embeddings are narrower than the layers."""
    hidden = keys.number("hidden_size")
    narrow = keys.number("word_embed_proj_dim", hidden)
    projections = 2 * hidden * narrow if narrow != hidden else 0
    last_norm = keys.flag("do_layer_norm_before", True) and not keys.flag("_remove_final_layer_norm", False)
    biased = 2 if keys.flag("layer_norm_elementwise_affine", True) else 0
    return (keys.number("max_position_embeddings") + 2) * hidden + projections + (biased * hidden if last_norm else 0)


def _falcon_norms(keys: Keys) -> int:
    if not keys.flag("parallel_attn", True):
        return 2
    return keys.number("num_ln_in_parallel_attn", 2 if keys.flag("new_decoder_architecture", False) else 1)


def _stablelm_norms(keys: Keys) -> int:
    return 1 if keys.flag("use_parallel_residual", False) else 2


_GPT2 = Family(
    norm_bias=True, qkv_bias=True, out_bias=True, gated_mlp=False, mlp_bias=True, wide=4, outside=learned_positions,
    aliases=_OLD_NAMES,
)  # fmt: skip
_GPTJ = Family(norms=1, norm_bias=True, gated_mlp=False, mlp_bias=True, wide=4, head_bias=True, aliases=_OLD_NAMES)
_GEMMA2 = replace(BIASED, norms=4, kinds=rules.full_every("", 2))
_GEMMA3 = replace(_GEMMA2, qk_norm="head", kinds=rules.full_every("sliding_window_pattern", 6))
_OLMO2 = replace(BIASED, qk_norm="wide", kinds=rules.full_every("", 4))

DENSE: Mapping[str, Family] = MappingProxyType(
    {
        "llama": LLAMA,
        "mistral": Family(),
        "ministral": Family(),
        "ministral3": Family(),
        "qwen": replace(QWEN2, kinds=rules.all_full, adapt=adapt.qwen1, aliases={
            "seq_length": "max_position_embeddings", "kv_channels": "head_dim"}),
        "qwen2": QWEN2,
        "qwen3": QWEN3,
        "mimo": replace(QWEN2, qkv_bias="attention_bias"),
        "phi": Family(norms=1, norm_bias=True, qkv_bias=True, out_bias=True, gated_mlp=False, mlp_bias=True,
                      qk_norm="head", qk_norm_bias=True, qk_norm_if="qk_layernorm", head_bias=True),
        "phi3": Family(),
        "persimmon": Family(norm_bias=True, qkv_bias=True, out_bias=True, gated_mlp=False, mlp_bias=True,
                            qk_norm="head", qk_norm_bias=True, qk_norm_if="qk_layernorm"),
        "gemma": BIASED,
        "gemma2": _GEMMA2,
        "gemma3_text": _GEMMA3,
        "vaultgemma": replace(_GEMMA2, norms=2),
        "glm": replace(BIASED, out_bias=False),
        "glm4": replace(BIASED, out_bias=False, norms=4),
        "chatglm": replace(BIASED, out_bias=False, adapt=adapt.chatglm),
        "cohere": replace(BIASED, norms=1, qk_norm="wide", qk_norm_if="use_qk_norm"),
        "cohere2": replace(BIASED, norms=1, kinds=rules.full_every("sliding_window_pattern", 4)),
        "olmo": replace(BIASED, norms=0, last_norms=0),
        "olmo2": replace(_OLMO2, kinds=rules.all_full),
        "olmo3": _OLMO2,
        "starcoder2": Family(norm_bias=True, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias",
                             gated_mlp=False),
        "stablelm": Family(norms=_stablelm_norms, norm_bias=True, qkv_bias="use_qkv_bias", qk_norm="wide",
                           qk_norm_if="qk_layernorm"),
        "granite": LLAMA,
        "granite_swa": replace(LLAMA, sinks="all", kinds=rules.full_every("", 4, first=True)),
        "smollm3": replace(LLAMA, kinds=rules.smollm3),
        "seed_oss": replace(LLAMA, out_bias="attention_out_bias"),
        "ernie4_5": Family(qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias"),
        "exaone": Family(aliases={"num_layers": "num_hidden_layers"}),
        "exaone4": Family(qk_norm="head", kinds=rules.by_pattern),
        "helium": replace(LLAMA, out_bias=False),
        "cwm": Family(kinds=rules.full_every("", 4, first=True), mlp_bias="mlp_bias"),
        "hunyuan_v1_dense": replace(BIASED, qk_norm="head"),
        "hyperclovax": replace(LLAMA, norms=lambda keys: 4 if decided(keys, "use_post_norm") else 2),
        "jais2": replace(TWO_MATRICES, norm_bias=True),
        "nemotron": replace(TWO_MATRICES, norm_bias=True),
        "arcee": TWO_MATRICES,
        "apertus": replace(BIASED, qk_norm="head", gated_mlp=False, further=lambda _: 2),  # of the activation
        "bitnet": replace(BIASED, further=lambda keys: keys.number("hidden_size") + keys.number("intermediate_size")),
        "diffllama": replace(BIASED, further=lambda keys: 4 * keys.number(
            "head_dim", keys.number("hidden_size") // keys.number("num_attention_heads"))),
        "nanochat": replace(BIASED, norms=0, last_norms=0, gated_mlp=False),
        "minicpm": replace(BIASED, defaults={"tie_word_embeddings": True}),
        "baichuan": Family(aliases={"model_max_length": "max_position_embeddings"}),
        "internlm": Family(qkv_bias="bias", out_bias="bias"),
        "internlm2": Family(qkv_bias="bias", out_bias="bias"),
        "internlm3": Family(qkv_bias="qkv_bias", out_bias="bias", mlp_bias="bias"),
        "minicpm3": replace(LLAMA, attention="mla"),
        "youtu": replace(BIASED, attention="mla"),
        "gpt2": _GPT2,
        "gpt-sw3": _GPT2,
        "gpt_bigcode": replace(_GPT2, adapt=adapt.multi_query),
        "openai-gpt": replace(_GPT2, last_norms=0),
        "gpt_neo": replace(_GPT2, qkv_bias=False, adapt=adapt.gpt_neo, aliases={
            "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "window_size": "sliding_window"}),
        "gpt_neox": Family(norm_bias=True, qkv_bias="attention_bias", out_bias="attention_bias", gated_mlp=False,
                           mlp_bias=True),
        "gptj": _GPTJ,
        "codegen": _GPTJ,
        "opt": Family(last_norms=0, norm_bias=True, qkv_bias="enable_bias", out_bias="enable_bias",
                      mlp_bias="enable_bias", gated_mlp=False, outside=_opt_outside, embedding="word_embed_proj_dim",
                      aliases={"ffn_dim": "intermediate_size"}),
        "bloom": replace(_GPT2, outside=lambda keys: 2 * keys.number("hidden_size"), aliases={
            **_OLD_NAMES, "n_embed": "hidden_size", "seq_length": "max_position_embeddings"},
            defaults={"max_position_embeddings": 2048}),
        "mpt": Family(gated_mlp=False, adapt=adapt.mpt, aliases={
            "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
            "max_seq_len": "max_position_embeddings"}),
        "falcon": Family(norms=_falcon_norms, norm_bias=True, qkv_bias="bias", out_bias="bias", mlp_bias="bias",
                         gated_mlp=False, wide=4, adapt=adapt.falcon, aliases={
            "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "ffn_hidden_size": "intermediate_size"}),
        "biogpt": replace(_GPT2, aliases={}, outside=lambda keys: learned_positions(keys)
                          + 2 * keys.number("hidden_size")),
        "xglm": replace(_GPT2, outside=None, aliases={
            "d_model": "hidden_size", "ffn_dim": "intermediate_size", "num_layers": "num_hidden_layers",
            "attention_heads": "num_attention_heads"}),
    }
)  # fmt: skip
